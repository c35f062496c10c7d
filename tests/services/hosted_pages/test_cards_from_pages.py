"""The card that a customer entered on a page: what it pays, and whose it is."""

from __future__ import annotations

from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from billing_worker.persistence.schema import tables
from billing_worker.services.cards.new_card import use_card
from billing_worker.services.hosted_pages import poll
from tests.support.pages import (
    DAY,
    HOUR,
    INVOICE,
    MINUTE,
    answering,
    default_card,
    pay,
    payment,
    rows,
    tokenise,
    told,
)


def test_a_card_that_the_customer_was_asked_for_replaces_one_that_could_still_be_charged(world):
    world.subscribe("decline_declined")
    world.run_for(5 * DAY, step=8 * HOUR)
    assert [event.data["reason"] for event in told(world, "card.needed")]
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    assert default_card(world) == payment(world).card_id
    assert world.fate() == "paid"
    assert world.explain()["attempts"][-1]["origin"] == "new_card"
    assert world.debits() == {"card-1": 1, INVOICE: 1}


def test_a_card_that_a_customer_enters_for_something_else_does_not_revive_a_suspended_one(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=12 * HOUR)
    assert rows(world, tables.subscriptions)[0].status == "suspended"
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    assert world.fate() == "uncollectible"
    assert rows(world, tables.subscriptions)[0].status == "suspended"
    assert world.debits() == {"card-1": 1}


def test_the_card_of_a_page_brings_a_suspended_one_back_once_somebody_gives_it_for_that(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=12 * HOUR)
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    use_card(world.store, world.clock, subscription_reference="sub-1",
             card_id=payment(world).card_id, by="ann", why="wants it back")  # fmt: skip
    world.tick()
    assert (world.fate(), rows(world, tables.subscriptions)[0].status) == ("paid", "active")


def test_the_card_that_pays_an_invoice_on_its_page_becomes_its_subscriptions_default(world):
    world.subscribe("decline_insufficient_funds")
    world.subscribe("approved", "sub-2", customer={"reference_id": "customer-of-sub-1"})
    world.tick()
    pay(world, tokenise(world, invoice=INVOICE))
    world.run_for(HOUR, step=5 * MINUTE)
    assert world.fate() == "paid"
    assert default_card(world) == payment(world).card_id
    assert default_card(world, "sub-2") != payment(world).card_id
    assert world.debits() == {INVOICE: 1, "sub-2-p0": 1}


def test_a_card_for_several_subscriptions_is_stored_once_with_all_that_is_known_of_it(world):
    world.subscribe(None, "sub-1")
    world.subscribe(None, "sub-2", customer={"reference_id": "customer-of-sub-1"})
    world.tick()
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    (card,) = rows(world, tables.cards)
    assert (card.holder, card.issuer_name) == ("JANE DOE", "FIRST DATA CORPORATION")
    assert default_card(world, "sub-1") == default_card(world, "sub-2") == card.id
    assert (world.fate(), world.fate("sub-2-p0")) == ("paid", "paid")


@pytest.mark.parametrize("year", ["20312", "100", "1999", 2101])
def test_a_card_with_a_year_that_is_none_is_stored_without_it(world, year):
    world.subscribe(None)
    world.tick()
    page = tokenise(world)
    pay(world, page)

    def misprint(attributes):
        if attributes["payload"]:
            attributes["payload"]["payment_card"]["expiry_year"] = year

    answering(world, misprint)
    world.run_for(HOUR, step=5 * MINUTE)
    (card,) = rows(world, tables.cards)
    assert card.expiry_year is None
    assert world.fate() == "paid"


def test_a_bug_in_the_poll_at_one_page_is_alerted_and_keeps_no_other_waiting(world, monkeypatch):
    first, second = tokenise(world, "card-1"), tokenise(world, "card-2", "customer-2")
    pay(world, first)
    pay(world, second)
    real = poll.settle_page

    def trips_over_the_first(session, setup, *rest):
        if setup.reference_id == "card-1":
            raise ValueError("year 20312 is out of range")
        return real(session, setup, *rest)

    monkeypatch.setattr(poll, "settle_page", trips_over_the_first)
    with capture_logs() as logs:
        world.run_for(MINUTE, step=timedelta(seconds=15))
    states = {row.reference_id: row.status for row in rows(world, tables.card_setups)}
    assert states == {"card-1": "open", "card-2": "stored"}
    alerts = [log for log in logs if log["event"] == "billing.alert"]
    assert {(log["kind"], log["page"]) for log in alerts} == {("card_setup.crashed", "card-1")}
    monkeypatch.undo()
    world.run_for(5 * MINUTE)
    assert {row.status for row in rows(world, tables.card_setups)} == {"stored"}


def test_a_page_that_paid_an_invoice_and_brought_no_card_says_so_in_the_invoices_history(declined):
    page = tokenise(declined, invoice=INVOICE)
    answering(declined, lambda attributes: attributes.update(payload=None))
    pay(declined, page)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    assert declined.fate() == "paid"
    (entry,) = (e for e in declined.explain()["history"] if e["kind"] == "card.not_stored")
    assert entry["alert"]
    assert entry["data"]["reason"] == "token_missing"
