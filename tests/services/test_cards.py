"""Several cards, dead ones, expired ones, and everything at once; on both databases."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from sqlalchemy import event, insert, select, update

from billing_worker.domain.card import Card, warning_due
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import Stated
from billing_worker.persistence import cards, customers
from billing_worker.persistence.attempts import LockedCases, keys_of
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.services.attempts.claim import claim
from billing_worker.services.attempts.commit import _commit
from billing_worker.services.attempts.retry_limits import Budget
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.attempts.submit import Submit
from billing_worker.services.cards.expiry import warn_expiring
from billing_worker.services.cards.listing import list_cards
from billing_worker.services.charging.charge import _created, _order
from billing_worker.services.charging.session import ChargeSession
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import choose_policy, give_up_overdue
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.subscribe import FOREIGN, subscribe
from tests.support.recovery import (
    add_backup,
    banks_change_their_mind,
    decline_stands,
    events,
    origins,
    replace,
    retry,
    sold_at,
    subscription,
)
from tests.support.world import World

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ANN = {"reference_id": "ann"}


# --- dead cards -----------------------------------------------------------------------------


def test_a_hard_decline_makes_the_card_unusable_and_asks_for_another(world):
    world.subscribe("decline_card_is_stolen")
    world.tick()
    assert [one["reason"] for one in events(world, "card.unusable")] == [
        "declined_hard: card_is_stolen"
    ]
    assert len(events(world, "card.needed")) == 1
    world.run_for(40 * DAY, step=5 * DAY)
    assert len(sold_at(world)) == 1


def test_a_dead_card_is_dead_for_every_subscription_that_has_it_and_no_call_is_made(world):
    world.subscribe("decline_card_is_stolen.1", "sub-1", customer=ANN)
    world.tick()
    calls = len(world.transport.sent)
    world.subscribe("decline_card_is_stolen.1", "sub-2", customer=ANN)
    world.tick()
    assert world.explain("sub-2-p0")["attempts"] == []
    assert "card_unusable" in world.explain("sub-2-p0")["reason"]
    assert len(world.transport.sent) == calls


def test_a_card_that_dies_between_claim_and_sale_is_not_sold_and_the_invoice_asks_for_another(
    world,
):
    world.subscribe("approved")
    dies_at = iter([1])

    def dies(request):
        if request.url.endswith("/payment-invoices") and next(dies_at, None):
            with world.store.transaction() as connection:
                connection.execute(update(tables.cards).values(unusable_reason="stolen"))

    world.transport.before_send = dies
    world.tick()
    world.tick()
    assert sold_at(world) == []
    assert world.explain()["reason"] == "card_unusable: stolen"
    assert [one["rule"] for one in events(world, "attempt.forbidden")] == ["card.usable"]


def test_the_backup_card_is_charged_as_soon_as_the_decline_stands_when_the_default_one_is_dead(
    world,
):
    world.subscribe("decline_card_is_stolen")
    add_backup(world, "approved.backup")
    world.tick()
    decline_stands(world)
    assert origins(world) == ["scheduled", "backup"]
    assert world.fate() == "paid"


def test_the_next_period_goes_straight_to_the_backup_card(world):
    world.subscribe("decline_card_is_stolen", ends_after_periods=2)
    add_backup(world, "approved.backup")
    world.run_for(30 * DAY, step=2 * DAY)
    assert origins(world, "sub-1-p1") == ["scheduled"]
    assert world.fate("sub-1-p1") == "paid"


@pytest.mark.parametrize("token", ["decline_insufficient_funds", "decline_auth_3ds_required"])
def test_the_backup_card_is_not_touched_while_the_default_one_may_still_pay(world, token):
    world.subscribe(token)
    add_backup(world, "approved.backup")
    world.run_for(5 * DAY, step=DAY)
    assert origins(world)[0] == "scheduled"
    assert "backup" not in origins(world)
    assert world.debits() == {}


def test_a_card_without_recorded_consent_is_never_a_backup(world):
    world.subscribe("approved.other")
    replace(world, "decline_card_is_stolen")
    world.run_for(3 * DAY, step=DAY)
    assert world.debits() == {}
    with pytest.raises(InvalidInput, match="consent"):
        add_backup_without_consent(world)


def add_backup_without_consent(world):
    from billing_worker.services.cards.new_card import add_backup_card  # noqa: PLC0415
    from tests.support.recovery import card  # noqa: PLC0415

    add_backup_card(
        world.store, world.vault, world.clock, subscription_reference="sub-1",
        card=card("approved.backup"), consent=" ", by="test",
    )  # fmt: skip


# --- expired cards --------------------------------------------------------------------------


def expiring_card(token="approved", month=1, year=2026):
    return {"token": token, "expiry_month": month, "expiry_year": year}


def test_an_expired_card_is_not_charged_and_no_call_is_made(world):
    world.subscribe(card=expiring_card(month=12, year=2025))
    world.tick()
    assert world.explain()["reason"] == "card_expired"
    assert world.explain()["attempts"] == []
    assert world.transport.sent == []
    assert len(events(world, "card.needed")) == 1


def test_a_card_is_charged_up_to_the_end_of_its_month(world):
    world.subscribe(card=expiring_card(month=1, year=2026))
    world.tick()
    assert world.fate() == "paid"


def test_an_invoice_that_nobody_gave_a_card_for_is_given_up_after_the_policys_patience(world):
    world.subscribe(card=expiring_card(month=12, year=2025))
    world.tick()
    world.clock.advance(31 * DAY)
    assert give_up_overdue(world.store, world.clock) == 1
    assert world.fate() == "uncollectible"


def test_a_warning_is_told_60_and_15_days_before_the_expiry_and_once_each(world):
    world.subscribe(card=expiring_card(month=4, year=2026))
    told = []
    while world.clock.now() < datetime(2026, 5, 10, tzinfo=UTC):
        if warn_expiring(world.store, world.clock):
            told.append(world.clock.now())
        world.clock.advance(DAY)
    expiry = datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert [(expiry - moment).days for moment in told] == [60, 15]
    assert [one["days"] for one in events(world, "card.expiring")] == [60, 15]


def test_after_a_pause_of_the_sweep_only_the_nearer_warning_is_told():
    card = Card(1, "f", "visa", 4, 2026, None, None)
    now = datetime(2026, 4, 25, tzinfo=UTC)
    assert warning_due(card, None, now) == 15
    assert warning_due(card, 15, now) is None


def test_nobody_is_warned_about_a_card_that_pays_for_nothing_any_more(world):
    world.subscribe(card=expiring_card(month=2, year=2026))
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(status="cancelled", next_billing_at=None)
        )
    assert warn_expiring(world.store, world.clock) == 0


# --- replacing ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["decline_card_is_stolen", "decline_insufficient_funds"])
def test_a_replaced_card_is_tried_at_once_on_what_waits(world, token):
    world.subscribe(token)
    world.tick()
    world.clock.advance(world.ports.timings.decline_stands)
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert origins(world) == ["scheduled", "new_card"]
    assert world.fate() == "paid"
    assert subscription(world).status == "active"


def test_a_replaced_card_is_tried_once_and_then_the_ladder_goes_on_where_it_was(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    planned = world.explain()["next_attempt_at"]
    replace(world, "decline_insufficient_funds.new")
    decline_stands(world)
    assert origins(world) == ["scheduled", "new_card"]
    assert world.explain()["next_attempt_at"] == planned


def test_a_subscription_without_a_card_is_charged_when_it_gets_one(world):
    world.subscribe(None)
    world.tick()
    replace(world, "approved")
    world.tick()
    assert world.fate() == "paid"


def test_a_card_that_arrives_while_an_attempt_is_in_flight_waits_for_its_end(world):
    world.subscribe("approved_later")
    world.tick()
    answer = replace(world, "approved.new")
    assert (answer["tried"], answer["in_flight"]) == ([], ["sub-1-p0"])
    world.run_for(2 * HOUR, step=timedelta(minutes=5))
    assert world.debits() == {"sub-1-p0": 1}


def test_what_may_have_been_paid_is_not_tried_on_a_new_card(world):
    world.subscribe("decline_duplicated_transaction")
    world.tick()
    assert replace(world, "approved.new")["tried"] == []
    world.run_for(DAY, step=HOUR)
    assert world.attempts() == ["declined"]


def test_a_prepared_attempt_on_the_old_card_is_withdrawn_when_the_card_is_replaced(world):
    world.subscribe("decline_card_is_lost")
    world.transport.unreachable = True
    world.tick()
    assert world.attempts() == ["prepared"]
    world.transport.unreachable = False
    replace(world, "approved.new")
    world.run_for(HOUR, step=timedelta(minutes=5))
    assert world.attempts() == ["not_charged", "succeeded"]


def test_a_new_card_is_tried_on_an_invoice_whose_ladder_has_left_it_open(world):
    world.subscribe("decline_insufficient_funds", ends_after_periods=1)
    choose_policy(
        world.store, world.clock, subscription_reference="sub-1", policy="short", by="t", why="t"
    )
    world.run_for(20 * DAY, step=DAY)
    assert world.explain()["reason"].startswith("recovery_ended: ")
    assert world.explain()["status"] == "open"
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert world.fate() == "paid"


def test_a_new_card_is_tried_on_what_an_ended_subscription_still_owes(world):
    world.subscribe("decline_card_is_stolen", ends_after_periods=1)
    world.tick()
    world.clock.advance(31 * DAY)
    give_up_overdue(world.store, world.clock)
    assert (world.fate(), subscription(world).status) == ("uncollectible", "ended")
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert (world.fate(), subscription(world).status) == ("paid", "ended")


def test_a_new_card_is_tried_once_on_an_invoice_whose_token_the_gateway_did_not_know(world):
    world.subscribe("rejects_token", ends_after_periods=1)
    world.tick()
    assert world.explain()["next_attempt_at"] is None
    replace(world, "rejects_token.again")
    world.run_for(2 * DAY, step=HOUR)
    assert origins(world) == ["scheduled", "new_card"]
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert world.fate() == "paid"


def test_a_new_card_of_a_paused_subscription_is_tried_when_it_is_resumed(world):
    world.subscribe("decline_card_is_stolen")
    world.tick()
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    replace(world, "approved.new")
    world.run_for(DAY, step=HOUR)
    assert origins(world) == ["scheduled"]
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="test")
    world.tick()
    assert world.fate() == "paid"


def test_the_same_card_entered_again_is_not_charged_again_for_it_after_its_decline(world):
    world.subscribe("pending_forever.1", ends_after_periods=1)
    world.tick()
    assert replace(world, "pending_forever.1")["in_flight"] == ["sub-1-p0"]
    declines_from_now_on(world)
    world.run_for(HOUR, step=timedelta(minutes=5))
    assert world.attempts() == ["declined"]
    assert world.explain()["next_attempt_at"] > (world.clock.now() + 12 * HOUR).isoformat()


def declines_from_now_on(world):
    """Whatever is pending at the gateway is refused: there is no money."""
    poll = world.ports.gateway.poll

    def declined(gateway_id, calls):
        return dataclasses.replace(
            poll(gateway_id, calls), status="process_failed", resolution="insufficient_funds"
        )

    world.ports.gateway.poll = declined


# --- whose card it is -----------------------------------------------------------------------


def test_a_token_of_another_customer_is_neither_stored_nor_charged(world):
    world.subscribe("decline_card_is_stolen", "sub-1")
    world.subscribe("approved.2", "sub-2")
    before = card_ids(world)
    for store_it in (replace, add_backup):
        with pytest.raises(InvalidInput, match="another customer") as refused:
            store_it(world, "approved.2", "sub-1")
        assert refused.value.field == "card.token"
    order = {"reference_id": "buy-1", "customer": ANN, "amount": "1.00", "currency": "USD",
             "card": {"token": "approved.2"}}  # fmt: skip
    answer = carry_out(world.ports, Message("billing.charge_once", order))
    assert [fault.field for fault in answer.errors] == ["card.token"]
    assert card_ids(world) == before


def test_a_record_with_the_token_of_another_customer_is_refused_and_the_others_are_added(world):
    world.subscribe("approved.1", "sub-1")
    record = {"amount": "1.00", "currency": "USD", "interval": "month",
              "anchor_at": world.clock.now().isoformat()}  # fmt: skip
    ours, theirs, twice, good = (
        parse_record(
            record
            | {"reference_id": reference, "card": {"token": token}}
            | {"customer": {"reference_id": customer}}
        )
        for reference, customer, token in (
            ("new-1", "customer-of-sub-1", "approved.1"),
            ("new-2", "ann", "approved.1"),
            ("new-3", "bob", "approved.4"),
            ("new-4", "ann", "approved.4"),
        )
    )
    for dry_run in (True, False):
        done = subscribe(
            world.store, world.vault, world.clock, [ours, theirs, twice, good],
            by="test", dry_run=dry_run,
        )  # fmt: skip
        assert done.outcomes == ("added", FOREIGN, "added", FOREIGN)
    with world.store.reading() as connection:
        known = set(connection.execute(select(tables.subscriptions.c.reference_id)).scalars())
    assert known == {"sub-1", "new-1", "new-3"}


def test_a_command_with_the_token_of_another_customer_is_refused_by_its_field(world):
    world.subscribe("approved.1", "sub-1")
    record = {"reference_id": "sub-9", "customer": ANN, "card": {"token": "approved.1"},
              "amount": "1.00", "currency": "USD", "interval": "month",
              "anchor_at": world.clock.now().isoformat()}  # fmt: skip
    answer = carry_out(world.ports, Message("billing.subscribe", record))
    assert [(fault.field, fault.reason) for fault in answer.errors] == [
        ("card.token", "belongs to another customer")
    ]


@pytest.mark.parametrize(
    ("token", "changes", "field"),
    [
        ("decline_card_is_stolen.1", {}, "card.token"),
        ("approved.new", {"expiry_year": 2025}, "card.expiry_year"),
    ],
)
def test_a_card_that_cannot_be_charged_replaces_nothing(world, token, changes, field):
    world.subscribe("decline_card_is_stolen.1")
    world.tick()
    before = subscription(world).card_id
    with pytest.raises(InvalidInput) as refused:
        replace(world, token, **changes)
    assert refused.value.field == field
    assert subscription(world).card_id == before


def test_the_list_of_cards_tells_their_roles_and_no_token(world):
    world.subscribe("decline_card_is_stolen")
    add_backup(world, "approved.backup")
    world.tick()
    with world.store.reading() as connection:
        default, backup = list_cards(connection, "sub-1", world.clock.now())
    assert default["default_for"] == ["sub-1"]
    assert default["not_chargeable"] == "card_unusable: declined_hard: card_is_stolen"
    assert backup["backup"] == "test: ticked at checkout"
    assert not {"token", "fingerprint"} & (default.keys() | backup.keys())


# --- two workers, one budget ----------------------------------------------------------------


def test_two_workers_cannot_both_make_the_last_attempt_that_a_network_allows(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    for reference in ("sub-1", "sub-2"):
        world.subscribe(
            "decline_insufficient_funds.1", reference, customer=ANN, ends_after_periods=1
        )
    world.tick()
    for _ in range(7):
        retry(world)
        decline_stands(world)
    first, second = stored_twice(world)  # one fingerprint, and one try left
    price, now = Money.parse("9.99", "USD"), world.clock.now()
    refused = []

    def other_worker():
        with store.transaction() as connection:
            refused.append(Budget(connection, [second], now).spend(second, price, 0))

    with store.transaction() as connection:
        assert Budget(connection, [first], now).spend(first, price, 0) is None
        other = threading.Thread(target=other_worker)
        other.start()
        other.join(0.5)
        assert refused == []  # it waits for the one that came first
        connection.execute(a_sale_on(connection, first, now))
    other.join(10)
    store.close()
    assert [one.rule for one in refused] == ["mastercard.10_declines_in_24_hours"]


def stored_twice(world):
    """As older versions kept a token that came in twice."""
    with world.store.transaction() as connection:
        row = dict(connection.execute(select(tables.cards)).one()._mapping)
        connection.execute(insert(tables.cards).values(row | {"id": row["id"] + 1}))
    return card_ids(world)


def test_an_attempt_that_is_being_armed_without_a_lock_counts_for_all_that_come_after(
    postgres_url,
):
    store = Store(postgres_url)
    world = World(store)
    [first] = claimed(world, ["sub-0"])
    price, now = first.attempt.money, world.clock.now()
    with store.transaction() as connection:
        LockedCases(connection, [first.key])
        first_card = first.attempt.card_id
        assert Budget(connection, [first_card], now).spend(first_card, price, 0) is None
        others = claimed(world, [f"sub-{n}" for n in range(1, 11)])
        with store.transaction() as other:
            LockedCases(other, [one.key for one in others])
            ids = [one.attempt.card_id for one in others]
            budget = Budget(other, ids, now)
            answers = [budget.spend(card_id, price, 0) for card_id in ids]
    store.close()
    assert [answer is None for answer in answers] == [True] * 9 + [False]


def test_an_ordinary_charge_asks_once_and_waits_for_nobody(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    [one] = claimed(world, ["sub-1"])
    asked = []
    event.listen(store.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
    with store.transaction() as holder, store.transaction() as connection:
        cards.lock_budgets(holder, [one.attempt.card_id])
        asked.clear()
        Budget(connection, [one.attempt.card_id], world.clock.now())
        assert len(asked) == 1
    store.close()


def claimed(world, references, token="approved.1"):
    """Prepared first attempts of new subscriptions of one customer, all with one card."""
    for reference in references:
        world.subscribe(token, reference, customer=ANN, ends_after_periods=1)
    renew_due(world.ports)
    return claim(world.ports, [row_id(world, tables.invoices, f"{one}-p0") for one in references])


def row_id(world, table, reference):
    with world.store.reading() as connection:
        query = select(table.c.id).where(table.c.reference_id == reference)
        return connection.execute(query).scalar_one()


def test_many_invoices_of_one_card_that_are_due_at_once_stay_within_its_limit(world):
    for number in range(15):
        world.subscribe("pending_forever.1", f"sub-{number}", customer=ANN, ends_after_periods=1)
    world.tick()
    assert len(sold(world)) == 10
    declines_from_now_on(world)
    world.run_for(3 * HOUR, step=10 * timedelta(minutes=1))
    assert [sale.status for sale in sold(world)] == ["declined"] * 10


def test_a_dozen_invoices_of_one_card_that_are_open_for_minutes_are_all_paid_on_that_day(world):
    for number in range(12):
        world.subscribe("approved_later.1", f"sub-{number}", customer=ANN, ends_after_periods=1)
    world.run_for(3 * HOUR, step=10 * timedelta(minutes=1))
    assert [world.fate(f"sub-{number}-p0") for number in range(12)] == ["paid"] * 12


def test_attempts_on_one_card_that_are_armed_together_stay_within_its_limit(world):
    both = claimed(world, [f"sub-{number}" for number in range(12)])
    with world.store.transaction() as connection:
        one_row = both[0].attempt.card_id
        connection.execute(update(tables.attempts).values(card_id=one_row))
        budget = Budget(connection, [one_row], world.clock.now())
        answers = [budget.spend(one_row, one.attempt.money, 0) for one in both]
    assert [answer is None for answer in answers] == [True] * 10 + [False] * 2


def test_a_token_that_is_stored_while_its_card_dies_is_refused(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    world.subscribe("approved.1", "sub-1", customer=ANN)
    world.subscribe(None, "sub-2", customer=ANN)
    refused = []

    def enter_again():
        try:
            replace(world, "approved.1", "sub-2")
        except InvalidInput as error:
            refused.append((error.field, error.reason))

    with store.transaction() as connection:
        decline(connection, card_ids(world), "stolen", world.clock.now())
        entering = threading.Thread(target=enter_again)
        entering.start()
        entering.join(0.5)
        assert entering.is_alive()  # it waits for what becomes of the card
    entering.join(10)
    assert len(card_ids(world)) == 1
    store.close()
    assert refused == [("card.token", "this card cannot be charged (card_unusable: stolen)")]


def test_a_card_that_dies_while_its_token_is_given_once_more_is_dead_for_that_too(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    world.subscribe("approved.1", "sub-1", customer=ANN)
    known = card_ids(world)

    def dies():
        with store.transaction() as connection:
            decline(connection, known, "stolen", world.clock.now())

    with store.transaction() as connection:
        row = dict(connection.execute(select(tables.cards)).one()._mapping)
        del row["id"]
        customers.add_cards(connection, [row])
        dying = threading.Thread(target=dies)
        dying.start()
        dying.join(0.5)
        assert dying.is_alive()
    dying.join(10)
    with store.reading() as connection:
        reasons = list(connection.execute(select(tables.cards.c.unusable_reason)).scalars())
    store.close()
    assert reasons == ["stolen"]


def decline(connection, ids, reason, now):
    cards.lock_budgets(connection, ids)
    cards.remember_declines(connection, [(card_id, reason) for card_id in ids], now)


@pytest.mark.parametrize("arming", [False, True])
def test_batches_that_meet_on_two_cards_never_wait_for_each_other_in_a_circle(postgres_url, arming):
    store = Store(postgres_url)
    world = World(store)
    bob = {"reference_id": "bob"}
    for name, customer in (("a1", ANN), ("b1", bob)):
        world.subscribe(f"pending_forever.{name[0]}", name, customer=customer)
    world.tick()
    for name, customer in (("a2", ANN), ("b2", bob)):
        world.subscribe(f"pending_forever.{name[0]}", name, customer=customer)
    if arming:
        renew_due(world.ports)
        arms = {name: to_submit(world, name) for name in ("a2", "b2")}
    else:
        world.tick()
        arms = {name: to_decline(world, name) for name in ("a2", "b2")}
    batches = (
        [to_decline(world, "a1"), arms["b2"]],
        [to_decline(world, "b1"), arms["a2"]],
    )
    both_hold_one = threading.Barrier(2)
    seen = threading.local()

    def after(_connection, _cursor, statement, *_):
        """Whoever has its first lock of a card waits until the other one has its own."""
        locks = "FROM cards" in statement and "FOR NO KEY UPDATE" in statement
        if locks and not getattr(seen, "once", False):
            seen.once = True
            with suppress(threading.BrokenBarrierError):
                both_hold_one.wait(1)

    event.listen(store.engine, "after_cursor_execute", after)
    done = []

    def commit_it(batch):
        done.append(len(_commit(world.ports, batch)))

    workers = [threading.Thread(target=commit_it, args=(batch,)) for batch in batches]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    store.close()
    assert done == [2, 2]


def to_decline(world, name):
    """The news that the live attempt of a subscription's first invoice was refused."""
    attempt_id = row_id(world, tables.attempts, f"{name}-p0-a1")
    with world.store.reading() as connection:
        [(key, gateway_id)] = keys_of(connection, [attempt_id])
    said = world.ports.gateway.poll(gateway_id, [])
    no_money = {"status": "process_failed", "resolution": "insufficient_funds"}
    return Settle(key, Stated(dataclasses.replace(said, **no_money)), "test")


def to_submit(world, name):
    [mine] = claim(world.ports, [row_id(world, tables.invoices, f"{name}-p0")])
    session = ChargeSession.of(world.ports, mine)
    return Submit(mine, _created(session, _order(world.ports, mine)), ())


def test_whoever_warns_of_expiring_cards_locks_them_in_the_order_of_all_others(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    for reference in ("sub-1", "sub-2"):
        world.subscribe(card=expiring_card(f"approved.{reference}", month=2), reference=reference)
    replace(world, "approved.3", "sub-1", expiry_month=2, expiry_year=2026)
    _, lower, higher = card_ids(world)  # of the second subscription, of the first
    warned = []
    with store.transaction() as connection:
        cards.lock_budgets(connection, [lower])
        warning = threading.Thread(target=lambda: warned.append(warn_expiring(store, world.clock)))
        warning.start()
        warning.join(0.5)
        assert warned == []
        other = select(tables.cards.c.id).where(tables.cards.c.id == higher)
        connection.execute(other.with_for_update(nowait=True))
    warning.join(10)
    store.close()
    assert warned == [2]


def card_ids(world):
    with world.store.reading() as connection:
        return list(
            connection.execute(select(tables.cards.c.id).order_by(tables.cards.c.id)).scalars()
        )


def a_sale_on(connection, card_id, now):
    row = dict(connection.execute(select(tables.attempts)).first()._mapping)
    row |= {"number": 99, "reference_id": "r", "gateway_id": "cpi_r", "card_id": card_id}
    return insert(tables.attempts).values(
        **{key: value for key, value in row.items() if key != "id"}
        | {"status": "submitted", "submitted_at": now}
    )


# --- everything at once ---------------------------------------------------------------------

OUTCOMES = (
    *["decline_insufficient_funds"] * 6,
    *["decline_limit_violation"] * 3,
    "decline_issuer_decline",
    "decline_card_is_stolen",
    "decline_auth_3ds_required",
    "decline_fatal_error",
    "decline_unknown",
    "answer_lost_before",
    "answer_lost_after",
    "approved_later",
    "rejects_token",
    "approved",
)


ANNS = ("sub-1", "sub-2", "sub-3", "sub-4")
BOBS = ("sub-5",)


class Chaos:
    """Draws what customers, operators, banks, the broker and the clock do, from one seed."""

    def __init__(self, world, seed):
        self.world = world
        self.draw = random.Random(seed)
        self.bought = []

    def act(self):
        self.draw.choice(
            [self.retry, self.retry, self.retry, self.new_card, self.backup, self.storm,
             self.banks, self.later, self.later, self.doubled, self.shared_card, self.purchases]
        )()  # fmt: skip

    def reference(self):
        return self.draw.choice(ANNS + BOBS)

    def token(self, reference):
        # Few suffixes: the same card comes back under another subscription of its customer.
        owner = "bob" if reference in BOBS else "ann"
        if self.draw.random() < 0.1:
            owner = "bob" if owner == "ann" else "ann"  # somebody else's: refused once it is known
        return f"{self.draw.choice(OUTCOMES)}.{owner}{self.draw.randint(1, 2)}"

    def shared_card(self):
        """One card for all her subscriptions, and purchases that use the very row."""
        token = self.token("sub-1")
        for reference in ANNS:
            self.try_to(replace, token, reference)
        self.purchases()

    def purchases(self):
        for _ in range(self.draw.randint(1, 12)):
            reference = f"buy-{len(self.bought)}"
            order = {"reference_id": reference, "customer": ANN, "amount": "9.99",
                     "currency": "USD"}  # fmt: skip
            if carry_out(self.world.ports, Message("billing.charge_once", order)).status == "done":
                self.bought.append(reference)
        self.world.deliver()

    def retry(self):
        """An impatient operator: a dozen clicks within the hour."""
        for _ in range(self.draw.randint(1, 12)):
            reference = self.draw.choice([*ANNS, *BOBS, *self.bought[-3:]])
            self.try_to(retry, f"{reference}-p{self.draw.randint(0, 1)}")
            self.world.tick()
            self.world.clock.advance(self.draw.randint(0, 300))

    def new_card(self):
        reference = self.reference()
        self.try_to(replace, self.token(reference), reference)

    def backup(self):
        reference = self.reference()
        self.try_to(add_backup, self.token(reference), reference)

    def try_to(self, act, *arguments):
        with suppress(InvalidInput):  # no such invoice yet, no card, an attempt under way, a rule
            act(self.world, *arguments)

    def storm(self):
        """Callbacks ring for looks at everything, again and again."""
        with self.world.store.transaction() as connection:
            ids = tuple(connection.execute(select(tables.attempts.c.id)).scalars())
            now = self.world.clock.now()
            connection.execute(
                update(tables.attempts)
                .where(tables.attempts.c.next_poll_at.is_not(None))
                .values(next_poll_at=now)
            )
        for _ in range(3):
            self.world.run("look", ids)

    def banks(self):
        banks_change_their_mind(self.world, self.draw.choice(OUTCOMES))

    def later(self):
        self.world.run_for(timedelta(hours=self.draw.choice([1, 12, 72])), step=12 * HOUR)

    def doubled(self):
        self.world.sweep()
        self.world.bell.messages *= 3
        self.world.deliver()


def sold(world):
    """(attempt id, invoice id, when, fingerprint, amount, status), in the order of the sales."""
    a, c = tables.attempts, tables.cards
    query = (
        select(a.c.id, a.c.invoice_id, a.c.submitted_at, c.c.fingerprint, a.c.amount_minor,
               a.c.status)
        .join(c, c.c.id == a.c.card_id)
        .where(a.c.submitted_at.is_not(None))
        .order_by(a.c.submitted_at, a.c.id)
    )  # fmt: skip
    with world.store.reading() as connection:
        return connection.execute(query).all()


def deaths(world):
    """By fingerprint: the id of the attempt by which a card died."""
    e, a, c = tables.events, tables.attempts, tables.cards
    query = (
        select(c.c.fingerprint, e.c.attempt_id)
        .join(a, a.c.id == e.c.attempt_id)
        .join(c, c.c.id == a.c.card_id)
        .where(e.c.kind == "card.unusable")
        .order_by(e.c.id.desc())
    )
    with world.store.reading() as connection:
        return {row.fingerprint: row.attempt_id for row in connection.execute(query)}


@pytest.mark.parametrize("seed", range(2))
def test_no_sequence_of_events_breaks_the_slot_the_budget_or_the_peace_of_a_dead_card(world, seed):
    for reference in ANNS:
        world.subscribe("decline_insufficient_funds.ann1", reference, customer=ANN)
    world.subscribe("decline_insufficient_funds.bob1", *BOBS, customer={"reference_id": "bob"})
    world.tick()
    chaos = Chaos(world, seed)
    for _ in range(10):
        chaos.act()
    sales = sold(world)
    assert_one_at_a_time(world)
    assert_within_the_limits(sales)
    dead = deaths(world)
    at = {sale.id: sale.submitted_at for sale in sales}
    for sale in sales:
        killer = dead.get(sale.fingerprint)
        assert killer is None or sale.submitted_at <= at[killer], f"{sale.id} on a dead card"
    assert_nobody_has_the_card_of_another(world)


def assert_nobody_has_the_card_of_another(world):
    c = tables.cards
    with world.store.reading() as connection:
        pairs = set(connection.execute(select(c.c.fingerprint, c.c.customer_id)).all())
    assert len(pairs) == len({fingerprint for fingerprint, _ in pairs})


def assert_one_at_a_time(world):
    """The sales of an invoice never overlap: each is settled before the next is submitted."""
    by_invoice = defaultdict(list)
    a = tables.attempts
    with world.store.reading() as connection:
        for row in connection.execute(
            select(a).where(a.c.submitted_at.is_not(None)).order_by(a.c.number)
        ):
            by_invoice[row.invoice_id].append(row)
    for tries in by_invoice.values():
        for before, after in pairwise(tries):
            assert before.settled_at is not None
            assert before.settled_at <= after.submitted_at


def assert_within_the_limits(sales):
    """10 declines in 24 hours, 35 of one amount in 30 days: the sale that follows is too many."""
    by_card = defaultdict(list)
    for sale in sales:
        if sale.status in {"declined", "submitted"}:
            by_card[sale.fingerprint].append(sale)
    for tries in by_card.values():
        for n, sale in enumerate(tries):
            recent = [t for t in tries[:n] if t.submitted_at > sale.submitted_at - DAY]
            month = [
                t for t in tries[:n]
                if t.submitted_at > sale.submitted_at - 30 * DAY
                and t.amount_minor == sale.amount_minor
            ]  # fmt: skip
            assert len(recent) < 10
            assert len(month) < 35
