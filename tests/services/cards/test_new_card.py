"""What a customer's new card pays from now on, and what it collects; on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.expiry import warn_expiring
from billing_worker.services.cards.listing import list_cards
from billing_worker.services.cards.new_card import Scope
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import choose_policy
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from tests.support.recovery import (
    add_backup,
    banks_change_their_mind,
    decline_stands,
    events,
    origins,
    replace,
    retry,
    subscription,
)

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
ANN = {"reference_id": "ann"}


def send(world, task, **arguments):
    """A command of the queue; its answer."""
    return carry_out(world.ports, Message(f"billing.{task}", arguments)).as_json()


def pays_on_a_page(world, reference="page-1", **record):
    """The customer enters a card on a page of the gateway, and pays there."""
    asked = {"reference_id": reference, "customer": ANN}
    if "invoice" not in record:
        asked |= {"amount": "1.00", "currency": "USD"}
    page = start_tokenisation(world.ports, asked | record)
    world.sandbox.pay_on_page(page["gateway_id"])
    world.run_for(HOUR, step=10 * MINUTE)


def debits_since(world, moment):
    """(invoice or page, whole days from the moment), in order."""
    return [
        (debit.reference_id.rpartition("-a")[0] or debit.reference_id, (debit.at - moment).days)
        for debit in world.sandbox.ledger
        if debit.at >= moment
    ]


def owes_for_months(world, days):
    """A subscription whose ladder leaves open what nobody could pay."""
    world.subscribe("decline_insufficient_funds", customer=ANN)
    short = {"subscription_reference": "sub-1", "policy": "short", "by": "t", "why": "t"}
    choose_policy(world.store, world.clock, **short)
    world.run_for(days * DAY, step=DAY)


def suspended(world, reference="sub-1"):
    world.subscribe("decline_insufficient_funds", reference, customer=ANN)
    world.run_for(25 * DAY, step=12 * HOUR)
    assert subscription(world, reference).status == "suspended"


def cards_of(world, customer="ann"):
    with world.store.reading() as connection:
        return list_cards(connection, customer, world.clock.now())


# --- what it collects -----------------------------------------------------------------------


def test_six_months_of_debt_are_not_debited_in_one_second_but_a_day_apart_and_not_the_oldest(world):
    owes_for_months(world, 186)
    given = world.clock.now()
    answer = replace(world, "approved.new")
    assert answer["tried"] == ["sub-1-p5"]
    assert [one["invoice"] for one in answer["later"]] == ["sub-1-p6"]
    assert answer["for_a_person"] == [f"sub-1-p{n}" for n in range(5)]
    world.run_for(5 * DAY, step=HOUR)
    assert debits_since(world, given) == [("sub-1-p5", 0), ("sub-1-p6", 1)]


def test_what_a_new_card_does_not_collect_says_that_it_waits_for_a_person_and_who_can_charge_it(
    world,
):
    owes_for_months(world, 100)
    replace(world, "approved.new")
    told = world.explain("sub-1-p0")
    assert told["fate"] == "open, waiting for a person"
    assert "older than 62 days when another card was given" in told["why"]
    retry(world, "sub-1-p0")
    world.tick()
    assert world.fate("sub-1-p0") == "paid"


def test_a_debt_that_a_new_card_collects_on_another_day_says_so(world):
    owes_for_months(world, 40)
    replace(world, "approved.new")
    told = world.explain("sub-1-p1")
    assert told["fate"] == "open, next attempt dated"
    assert "one debt a day" in told["why"]
    assert told["next_attempt_at"] == (world.clock.now() + DAY).isoformat()


def test_a_second_new_card_on_the_same_day_brings_no_second_debit_of_that_day(world):
    owes_for_months(world, 40)
    given = world.clock.now()
    replace(world, "approved.first")
    world.tick()
    world.clock.advance(HOUR)
    answer = replace(world, "approved.second")
    assert (answer["tried"], len(answer["later"])) == ([], 1)
    world.run_for(3 * DAY, step=HOUR)
    assert debits_since(world, given) == [("sub-1-p0", 0), ("sub-1-p1", 1)]


def test_a_running_ladder_that_is_older_than_the_age_cap_goes_on_with_the_new_card(world):
    world.subscribe("approved", customer=ANN)
    world.tick()
    banks_change_their_mind(world, "decline_insufficient_funds")
    world.clock.advance(28 * DAY + 60 * DAY)  # two periods late: the older one is waived
    world.run_for(4 * DAY, step=HOUR)
    [open_one] = [i for i in ("sub-1-p1", "sub-1-p2") if world.explain(i)["status"] == "open"]
    planned = world.explain(open_one)["next_attempt_at"]
    replace(world, "approved.new")
    assert planned is not None
    world.run_for(8 * DAY, step=HOUR)
    assert world.fate(open_one) == "paid"


def test_a_new_sign_up_of_the_same_customer_revives_nothing_that_was_suspended(world):
    suspended(world)
    world.clock.advance(200 * DAY)
    signed_up = world.clock.now()
    pays_on_a_page(world)
    world.subscribe(None, "sub-2", customer=ANN, amount="5.00")
    world.run_for(3 * DAY, step=12 * HOUR)
    assert subscription(world).status == "suspended"
    assert debits_since(world, signed_up) == [("page-1", 0), ("sub-2-p0", 0)]


def test_a_new_sign_up_of_the_same_customer_debits_no_old_one_off(world):
    order = {"reference_id": "boat", "customer": ANN, "amount": "250.00", "currency": "USD",
             "card": {"token": "decline_card_is_stolen.ann"}}  # fmt: skip
    assert send(world, "charge_once", **order)["status"] == "done"
    world.tick()
    choose_policy(world.store, world.clock, subscription_reference="boat", policy="short",
                  by="t", why="t")  # fmt: skip
    world.clock.advance(300 * DAY)
    world.subscribe(None, "sub-2", customer=ANN)
    world.tick()
    pays_on_a_page(world)
    world.run_for(3 * DAY, step=12 * HOUR)
    assert world.debits()["boat-p0"] == 0
    assert world.fate("boat-p0") == "open, waiting for a person"


def test_a_page_that_pays_an_invoice_leaves_the_other_debts_to_the_next_days(world):
    owes_for_months(world, 40)
    given = world.clock.now()
    pays_on_a_page(world, invoice="sub-1-p0")
    world.run_for(3 * DAY, step=HOUR)
    assert debits_since(world, given) == [("sub-1-p0", 0), ("sub-1-p1", 1)]


def test_two_fresh_subscriptions_that_wait_for_a_card_are_both_paid_as_soon_as_there_is_one(world):
    for reference in ("sub-1", "sub-2"):
        world.subscribe(None, reference, customer=ANN)
    world.tick()
    pays_on_a_page(world)
    assert (world.fate("sub-1-p0"), world.fate("sub-2-p0")) == ("paid", "paid")


# --- what it pays from now on ---------------------------------------------------------------


def three_on_one_card(world, token="decline_insufficient_funds.old"):
    for reference in ("sub-1", "sub-2", "sub-3"):
        world.subscribe(token, reference, customer=ANN)
    world.subscribe("approved.other", "sub-4", customer=ANN)
    world.tick()


def card_of(world, reference):
    return subscription(world, reference).card_id


def test_a_card_for_the_subscription_alone_names_the_others_that_stay_on_the_old_one(world):
    three_on_one_card(world)
    record = {"subscription": "sub-1", "card": {"token": "approved.new"}}
    answer = send(world, "replace_card", reference_id="r-1", **record)
    assert answer["subscriptions"] == ["sub-1"]
    assert answer["on_the_old_card"] == ["sub-2", "sub-3"]
    assert card_of(world, "sub-2") == card_of(world, "sub-3") != card_of(world, "sub-1")


def test_the_card_that_they_all_have_leaves_none_on_an_old_one(world):
    three_on_one_card(world)
    record = {"subscription": "sub-1", "card_id": card_of(world, "sub-1")}
    answer = send(world, "use_card", reference_id="u-1", **record)
    assert answer["on_the_old_card"] == []


def test_a_card_for_the_customer_reaches_all_that_the_replaced_one_paid_and_lists_them(world):
    three_on_one_card(world)
    given = world.clock.now()
    record = {"subscription": "sub-2", "card": {"token": "approved.new"}, "scope": "customer"}
    answer = send(world, "replace_card", reference_id="r-1", **record)
    assert answer["subscriptions"] == ["sub-1", "sub-2", "sub-3"]
    assert answer["tried"] == ["sub-2-p0"]
    assert [one["invoice"] for one in answer["later"]] == ["sub-1-p0", "sub-3-p0"]
    world.clock.advance(world.ports.timings.decline_stands)
    world.run_for(3 * DAY, step=HOUR)
    assert debits_since(world, given) == [
        ("sub-4-p0", 0), ("sub-2-p0", 0), ("sub-1-p0", 1), ("sub-3-p0", 2),
    ]  # fmt: skip
    assert card_of(world, "sub-4") != card_of(world, "sub-1")


def test_a_page_that_pays_an_invoice_reaches_all_that_the_replaced_card_paid(world):
    three_on_one_card(world)
    pays_on_a_page(world, invoice="sub-2-p0")
    assert card_of(world, "sub-1") == card_of(world, "sub-2") == card_of(world, "sub-3")
    assert card_of(world, "sub-4") != card_of(world, "sub-1")


def test_the_same_token_given_again_is_no_second_card(world):
    world.subscribe("decline_insufficient_funds.old", customer=ANN)
    for _ in range(2):
        replace(world, "approved.new")
    order = {"reference_id": "buy", "customer": ANN, "amount": "1.00", "currency": "USD",
             "card": {"token": "approved.new"}}  # fmt: skip
    assert send(world, "charge_once", **order)["status"] == "done"
    world.subscribe("approved.new", "sub-2", customer=ANN)
    assert [card["default_for"] for card in cards_of(world)] == [[], ["sub-1", "buy", "sub-2"]]


def test_a_repeated_command_says_inside_as_outside_that_nothing_has_changed(world):
    world.subscribe("approved", customer=ANN)
    asked = {"reference_id": "p-1", "subscription": "sub-1"}
    first, again = send(world, "pause", **asked), send(world, "pause", **asked)
    assert (first["status"], first["subscription"]["outcome"]) == ("done", "changed")
    assert (again["status"], again["subscription"]["outcome"]) == ("unchanged", "unchanged")


# --- which card pays ------------------------------------------------------------------------


def test_a_token_first_and_the_subscription_later_charges_the_card_that_is_stored(world):
    pays_on_a_page(world)
    [card] = cards_of(world)
    assert card["default"] is True
    record = {"customer": ANN, "amount": "9.99", "currency": "USD", "interval": "month",
              "anchor_at": world.clock.now().isoformat()}  # fmt: skip
    assert send(world, "subscribe", reference_id="sub-1", **record)["status"] == "done"
    world.tick()
    assert world.fate() == "paid"
    assert cards_of(world)[0]["default_for"] == ["sub-1"]


def test_a_stored_card_is_attached_to_a_subscription_by_its_number(world):
    world.subscribe("decline_card_is_stolen.old", customer=ANN)
    world.tick()
    pays_on_a_page(world)
    world.subscribe("approved.third", "sub-2", customer=ANN)
    third = cards_of(world)[-1]["card_id"]
    asked = {"subscription": "sub-1", "card_id": third, "why": "asked on the phone"}
    answer = send(world, "use_card", reference_id="u-1", **asked)
    assert (answer["status"], answer["card_id"]) == ("done", third)
    assert card_of(world, "sub-1") == third
    assert send(world, "use_card", reference_id="u-1", **asked)["status"] == "unchanged"


@pytest.mark.parametrize("stranger", [True, False])
def test_a_card_of_somebody_else_or_of_nobody_is_not_attached(world, stranger):
    world.subscribe("approved", customer=ANN)
    world.subscribe("approved.bob", "sub-2", customer={"reference_id": "bob"})
    number = cards_of(world, "bob")[0]["card_id"] if stranger else 999
    answer = send(world, "use_card", reference_id="u-1", subscription="sub-1", card_id=number)
    assert (answer["status"], answer["errors"][0]["field"]) == ("refused", "card_id")


def test_a_dead_card_is_not_attached(world):
    world.subscribe("decline_card_is_stolen.old", customer=ANN)
    world.tick()
    number = cards_of(world)[0]["card_id"]
    answer = send(world, "use_card", reference_id="u-1", subscription="sub-1", card_id=number)
    assert "cannot be charged" in answer["errors"][0]["reason"]


def buy(world, reference="buy"):
    order = {"reference_id": reference, "customer": ANN, "amount": "1.00", "currency": "USD"}
    return send(world, "charge_once", **order)


def paid_with(world, invoice):
    a, i = tables.attempts, tables.invoices
    query = select(a.c.card_id).join(i, i.c.id == a.c.invoice_id)
    with world.store.reading() as connection:
        return connection.execute(query.where(i.c.reference_id == invoice)).scalar()


def test_a_charge_that_names_no_card_takes_the_default_one_and_not_the_newer_backup(world):
    world.subscribe("approved.default", customer=ANN)
    add_backup(world, "approved.backup")
    assert buy(world)["status"] == "done"
    world.tick()
    assert paid_with(world, "buy-p0") == card_of(world, "sub-1")


def test_a_charge_that_names_no_card_is_refused_when_there_is_only_a_backup(world):
    world.subscribe("decline_card_is_stolen.default", customer=ANN)
    world.tick()
    add_backup(world, "approved.backup")
    assert buy(world)["errors"][0]["field"] == "card"


def test_the_card_that_a_customer_gave_last_for_all_they_pay_is_their_default(world):
    world.subscribe("approved.first", customer=ANN)
    pays_on_a_page(world)
    replace(world, "approved.mine")  # for this subscription alone
    _, entered, mine = cards_of(world)
    assert (entered["default"], mine["default"]) == (True, False)
    replace(world, "approved.all", scope=Scope.CUSTOMER)
    assert [card["default"] for card in cards_of(world)] == [False, False, False, True]


def test_the_list_of_a_customers_cards_says_whose_they_are_and_what_they_are_for(world):
    pays_on_a_page(world)
    [card] = cards_of(world)
    shown = ("holder", "brand", "issuer", "default", "default_for", "backup")
    assert [card[name] for name in shown] == [
        "JANE DOE", "mastercard", "FIRST DATA CORPORATION", True, [], None,
    ]  # fmt: skip


# --- renewed cards --------------------------------------------------------------------------


def test_the_same_token_with_a_later_expiry_is_a_renewed_card_and_charged_again(world):
    old = {"token": "decline_card_expired.ann", "expiry_month": 12, "expiry_year": 2031}
    world.subscribe(card=old, customer=ANN)
    world.tick()
    assert "card_expired" in cards_of(world)[0]["not_chargeable"]
    banks_change_their_mind(world, "approved.renewed")
    answer = replace(world, "decline_card_expired.ann", expiry_year=2035)
    assert answer["tried"] == ["sub-1-p0"]
    decline_stands(world)
    [card] = cards_of(world)
    assert (card["expires"], card["not_chargeable"]) == ("2035-12", None)
    assert (world.fate(), origins(world)) == ("paid", ["scheduled", "new_card"])


@pytest.mark.parametrize(
    ("token", "year", "code"),
    [
        ("decline_card_is_stolen.ann", 2035, None),  # not dead of its age
        ("decline_card_expired.ann", 2032, None),  # not renewed
        ("decline_card_expired.ann", 2035, "R0"),  # the network's own word: never again
    ],
)
def test_a_card_that_died_of_something_else_or_is_not_renewed_stays_dead(world, token, year, code):
    old = {"token": token, "expiry_month": 12, "expiry_year": 2032, "brand": "visa"}
    world.subscribe(card=old, customer=ANN)
    world.tick()
    with world.store.transaction() as connection:
        connection.execute(tables.attempts.update().values(original_code=code))
    with pytest.raises(InvalidInput, match="cannot be charged"):
        replace(world, token, expiry_year=year)


def test_a_renewed_card_is_warned_of_before_its_new_expiry(world):
    old = {"token": "approved.1", "expiry_month": 2, "expiry_year": 2026}
    world.subscribe(card=old, customer=ANN)
    assert warn_expiring(world.store, world.clock) == 1
    replace(world, "approved.1", expiry_month=3, expiry_year=2026)
    assert warn_expiring(world.store, world.clock) == 1
    assert [one["expires"] for one in events(world, "card.expiring")] == ["2026-02", "2026-03"]
