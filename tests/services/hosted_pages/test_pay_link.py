"""A pay link: one page for one open invoice, in the place of an automatic attempt."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from billing_worker.domain.errors import (
    InvalidInput,
    NotPayable,
    SlotTaken,
)
from billing_worker.persistence.schema import tables
from billing_worker.persistence.switches import turn_sales
from billing_worker.services.hosted_pages.page_address import page_behind
from tests.support.pages import (
    DAY,
    HOUR,
    INVOICE,
    MINUTE,
    checkout,
    default_card,
    late_money_is_over,
    pay,
    payment,
    rows,
    sent,
)


def test_a_link_that_is_paid_settles_the_invoice_through_the_same_poll(declined):
    page = checkout(declined)
    pay(declined, page)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]
    assert declined.debits() == {INVOICE: 1}
    assert declined.explain()["attempts"][1]["origin"] == "link"


def test_the_answer_is_the_form_that_the_gateway_named_and_our_own_path_to_it(declined):
    page = checkout(declined)
    assert page["action"].endswith("/hpp/cgi_sandbox000000002")
    assert (page["method"], page["params"]) == ("GET", {})
    assert (page["amount"], page["currency"], page["invoice"]) == ("9.99", "USD", INVOICE)
    name = page["pay_path"].removeprefix("/pay/")
    found = page_behind(declined.store, declined.vault, name)
    assert found.action == page["action"]


def test_the_order_of_a_link_is_the_one_of_the_seed(declined):
    checkout(declined)
    attributes = sent(declined)[-1]["data"]["attributes"]
    assert attributes["flow"] == "charge"
    assert attributes["token"] == "decline_insufficient_funds.17"
    assert attributes["customer"]["reference_id"] == "customer-of-sub-1"
    assert "gateway_options" not in attributes


def test_we_never_send_a_sale_for_a_link(declined):
    page = checkout(declined)
    declined.run_for(3 * HOUR, step=15 * MINUTE)
    assert declined.sales(page["reference_id"]) == 0


def test_the_page_is_kept_encrypted_and_only_while_it_is_open(declined):
    page = checkout(declined)
    (_, link) = rows(declined, tables.attempts)
    assert page["action"].encode() not in link.page
    pay(declined, page)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    (_, link) = rows(declined, tables.attempts)
    assert link.page is None
    name = page["pay_path"].removeprefix("/pay/")
    assert page_behind(declined.store, declined.vault, name) is None


def test_the_same_link_again_is_the_same_page_and_creates_nothing(declined):
    first = checkout(declined)
    again = checkout(declined)
    assert again["action"] == first["action"]
    assert again["gateway_id"] == first["gateway_id"]
    assert declined.sandbox.requests.for_reference("create", first["reference_id"]) == 1


def test_a_link_is_refused_while_an_automatic_attempt_may_still_move_money(world):
    world.subscribe("answer_lost_after")
    world.tick()
    with pytest.raises(SlotTaken, match="sub-1-p0-a1, of origin scheduled, is submitted"):
        checkout(world)
    assert world.attempts() == ["submitted"]


def test_no_automatic_attempt_starts_while_a_link_is_open_although_its_date_has_come(declined):
    declined.sandbox.behaviour = replace(declined.sandbox.behaviour, lifetime_seconds=30 * 86400.0)
    checkout(declined)
    declined.run_for(10 * DAY, step=6 * HOUR)
    assert declined.attempts() == ["declined", "submitted"]
    assert declined.debits() == {}


def test_a_second_live_attempt_is_refused_by_the_database_itself(declined):
    checkout(declined)
    rule = r"uq_attempts_one_live|failed: attempts\.invoice_id"  # as SQLite calls it
    with pytest.raises(IntegrityError, match=rule), declined.store.transaction() as connection:
        connection.execute(
            update(tables.attempts).where(tables.attempts.c.number == 1).values(status="submitted")
        )


@pytest.mark.by_hand
@pytest.mark.parametrize("status", ["paid", "void"])
def test_there_is_no_link_for_an_invoice_that_is_not_open(world, status):
    world.subscribe("approved")
    world.tick()
    if status == "void":
        with world.store.transaction() as connection:
            connection.execute(update(tables.invoices).values(status="void", paid_at=None))
    with pytest.raises(NotPayable, match=f"{INVOICE} is {status}"):
        checkout(world)


def test_there_is_no_link_for_an_unknown_invoice(world):
    with pytest.raises(InvalidInput, match="there is no invoice"):
        checkout(world, "nobody-p0")
    assert world.transport.sent == []


def test_while_sales_are_stopped_no_link_is_handed_out(declined):
    with declined.store.transaction() as connection:
        turn_sales(connection, on=False, by="t", reason="r", now=declined.clock.now())
    with pytest.raises(NotPayable, match="switched off"):
        checkout(declined)
    assert declined.attempts() == ["declined"]


EXPIRED_CARD = {"token": "approved.1", "expiry_month": 12, "expiry_year": 2025}


@pytest.mark.parametrize(
    "card", [{"token": "decline_lost_or_stolen_card.1"}, EXPIRED_CARD, None], ids=str
)
def test_the_link_of_an_invoice_without_a_good_card_stores_the_card_that_pays_it(world, card):
    world.subscribe(card=card, ends_after_periods=2)
    world.tick()
    page = checkout(world)
    assert checkout(world) == page
    pay(world, page)
    world.run_for(HOUR, step=5 * MINUTE)
    assert (world.fate(), default_card(world)) == ("paid", payment(world).card_id)
    world.run_for(30 * DAY, step=12 * HOUR)
    assert world.debits() == {INVOICE: 1, "sub-1-p1": 1}


def test_a_link_without_a_good_card_that_nobody_paid_on_is_followed_by_another_one(world):
    world.subscribe("decline_lost_or_stolen_card")
    world.tick()
    first = checkout(world)
    world.run_for(3 * DAY, step=2 * HOUR)
    second = checkout(world)
    assert second["pay_path"] != first["pay_path"]
    pay(world, second)
    world.run_for(HOUR, step=5 * MINUTE)
    assert world.fate() == "paid"


def test_an_expired_link_gives_the_invoice_back_with_the_next_step_it_had(declined):
    before = declined.explain()
    checkout(declined)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    after = declined.explain()
    assert declined.attempts() == ["declined", "not_charged"]
    assert after["next_attempt_at"] == late_money_is_over(declined) > before["next_attempt_at"]
    assert after["reason"] == before["reason"]


def test_after_an_expired_link_the_next_step_comes_at_its_date_and_not_before(declined):
    due = declined.explain()["next_attempt_at"]
    checkout(declined)
    declined.run_for(5 * DAY, step=6 * HOUR)
    retried = declined.explain()["attempts"][2]
    assert retried["origin"] == "dunning"
    assert retried["submitted_at"] >= due


def test_an_expired_link_does_not_count_as_an_attempt_that_never_reached_the_card(world):
    world.subscribe("answer_lost_before")
    world.run_for(2.2 * HOUR, step=5 * MINUTE)
    assert world.attempts()[0] == "not_charged"
    with world.store.transaction() as connection:
        connection.execute(update(tables.invoices).values(next_attempt_at=None, enqueue_at=None,
                                                          reason="waits"))  # fmt: skip
    counted = rows(world, tables.invoices)[0].not_charged_count
    world.clock.advance(world.ports.timings.expired_retry)
    for _ in range(3):
        checkout(world)
        world.run_for(2.5 * HOUR, step=30 * MINUTE)
    assert rows(world, tables.invoices)[0].not_charged_count == counted
    assert world.explain()["reason"] == "waits"


def test_a_card_refused_on_the_page_keeps_the_slot_for_the_grace(declined):
    page = checkout(declined)
    _fail_on_page(declined, page)
    declined.run_for(50 * MINUTE, step=5 * MINUTE)
    assert declined.attempts() == ["declined", "submitted"]
    declined.run_for(20 * MINUTE, step=5 * MINUTE)
    assert declined.attempts() == ["declined", "declined"]


def test_a_customer_who_pays_with_the_second_card_on_the_page_has_paid_once(declined):
    page = checkout(declined)
    invoice = _fail_on_page(declined, page)
    declined.run_for(10 * MINUTE, step=MINUTE)
    invoice.status = "process_pending"
    pay(declined, page)
    declined.run_for(HOUR, step=5 * MINUTE)
    assert declined.fate() == "paid"
    assert declined.debits() == {INVOICE: 1}


def _fail_on_page(world, page):
    invoice = world.sandbox._books.with_id(page["gateway_id"])
    world.sandbox._books.acquirer._settle(
        invoice, "process_failed", "insufficient_funds", world.clock.now()
    )
    return invoice
