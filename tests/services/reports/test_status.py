"""What operators are told: where a period stands, why, and what happens next."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from click.testing import CliRunner
from sqlalchemy import select, update

from billing_worker.domain.events import Event, EventKind
from billing_worker.entrypoints.cli import cli
from billing_worker.persistence import history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.schema import tables
from billing_worker.persistence.switches import turn_sales
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.reports import status as report
from billing_worker.services.reports.wording import Fate, fate_of
from tests.entrypoints.test_config import GOOD
from tests.support.world import World

INVOICE = "sub-1-p0"
DAY = timedelta(days=1)


def status(world):
    with world.store.reading() as connection:
        return report.status(connection, world.clock.now())


def counts(world):
    return {line["fate"]: line["count"] for line in status(world)["invoices"]}


@pytest.fixture
def declined(world):
    world.subscribe("decline_insufficient_funds.17")
    world.tick()
    return world


@pytest.fixture
def told(database_url, monkeypatch):
    for name, value in (GOOD | {"BILLING_DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)

    def told(*arguments):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return told


# --- unknown, and what is not unknown -----------------------------------------------------------


def test_a_sale_that_nobody_answered_is_told_apart_from_a_gateway_that_has_not_decided(world):
    world.subscribe("never_answers_before")
    world.tick()
    assert (world.fate(), world.explain()["known"]) == ("unknown", "no answer yet")
    assert status(world)["unknown"] == {"no answer yet": 1}
    world.clock.advance(60)
    world.tick()
    assert (world.fate(), world.explain()["known"]) == ("unknown", "gateway undecided")
    assert status(world)["unknown"] == {"gateway undecided": 1}
    assert status(world)["oldest_unknown_seconds"] >= 60


def test_a_sale_that_was_answered_pending_is_undecided_at_once(world):
    world.subscribe("pending_forever")
    world.tick()
    assert world.explain()["known"] == "gateway undecided"


def test_a_pay_link_that_nobody_opened_is_not_unknown(declined):
    start_checkout(declined.ports, {"invoice": INVOICE})
    declined.run_for(timedelta(minutes=20), step=timedelta(minutes=5))
    assert declined.fate() == Fate.LINK == "open, pay link out, customer has not paid"
    assert counts(declined) == {Fate.LINK: 1}
    assert status(declined)["oldest_unknown_seconds"] is None
    assert status(declined)["unknown"] == {}
    assert "knows of no payment" in declined.explain()["why"]


def test_a_pay_link_on_which_something_happens_is_unknown(declined):
    start_checkout(declined.ports, {"invoice": INVOICE})
    with declined.store.transaction() as connection:
        attempt = connection.execute(
            select(tables.attempts).where(tables.attempts.c.origin == "link")
        ).one()
        data = {"found": "processing"}
        polled = Event(EventKind.ATTEMPT_POLLED, declined.clock.now(), "reconcile", data)
        history.write(connection, [Entry(polled, None, attempt.invoice_id, attempt.id)])
    declined.clock.advance(30)
    assert counts(declined) == {Fate.UNKNOWN: 1}
    assert declined.explain()["known"] == "gateway undecided"
    assert status(declined)["oldest_unknown_seconds"] == 30


def test_an_answer_that_does_not_fit_is_unknown_and_says_so(world):
    world.subscribe("partially_processed")
    world.run_for(timedelta(minutes=1), step=timedelta(seconds=30))
    assert world.explain()["known"] == "gateway's answer does not fit the order"
    assert "partially_processed" in world.explain()["why"]


def test_a_decline_that_the_gateway_takes_back_is_unknown_again_and_nobody_s_turn(world):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=10_000_000)
    world.subscribe("decline_insufficient_funds")
    world.tick()
    [invoice] = world.sandbox._books.with_reference(f"{INVOICE}-a1")
    invoice.status = "process_pending"
    world.run_for(timedelta(hours=2), step=timedelta(minutes=5))
    assert counts(world) == {Fate.UNKNOWN: 1}
    assert world.fate() == Fate.UNKNOWN
    assert status(world)["unknown"] == {"gateway has taken back that it was unpaid": 1}
    assert 3000 < status(world)["oldest_unknown_seconds"] < 3700
    assert "has taken that back" in world.explain()["why"]
    invoice.status = "process_failed"
    world.run_for(timedelta(hours=3), step=timedelta(minutes=15))
    assert counts(world) == {Fate.FOR_A_PERSON: 1}
    assert status(world)["oldest_unknown_seconds"] is None


# --- whose turn it is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "fate", "said"),
    [
        (None, Fate.FOR_A_CARD, "no card on file"),
        ("decline_card_expired", Fate.FOR_A_CARD, "the card has expired (card_expired)"),
        ("decline_invalid_cvv", Fate.FOR_THE_CUSTOMER, "the bank wants the security code"),
        ("decline_never_documented", Fate.FOR_A_PERSON, "never_documented"),
        ("wrong_amount", Fate.FOR_A_PERSON, "amount is"),
    ],
)
def test_a_card_the_customer_and_a_person_are_waited_for_apart(world, token, fate, said):
    world.subscribe(token)
    world.tick()
    assert world.fate() == fate
    assert counts(world) == {fate: 1}
    assert said in world.explain()["why"]
    assert INVOICE in world.explain()["next"]


def test_a_dated_attempt_says_why_and_when(declined):
    explained = declined.explain()
    assert explained["fate"] == Fate.DATED
    assert explained["why"] == (
        "Attempt 1 ended without money: not enough money on the account (insufficient_funds)."
    )
    assert explained["next"] == f"It is charged at {explained['next_attempt_at']}."


def test_what_stopped_sales_hold_back_is_told(declined):
    with declined.store.transaction() as connection:
        turn_sales(connection, on=False, by="ann", reason="incident", now=declined.clock.now())
    assert "not before sales are started again" in declined.explain()["next"]


def test_a_prepared_attempt_is_in_flight_and_says_that_nothing_was_sold(world):
    world.transport.unreachable = True
    world.subscribe()
    world.tick()
    assert world.fate() == Fate.IN_FLIGHT
    assert "nothing has been sold" in world.explain()["why"]
    assert "gateway not reached" in world.explain()["why"]


def test_every_end_has_a_fate():
    for ended in ("paid", "void", "uncollectible"):
        fate = fate_of(ended, None, known=None, waits=True, reason=None, patient=False)
        assert fate == ended


# --- money that is not owed, and money that bought a token --------------------------------------


def test_surplus_money_stays_in_status_however_many_alerts_follow(store, told):
    world = World(store)
    world.subscribe()
    world.tick()
    with store.transaction() as connection:
        connection.execute(update(tables.attempts).values(status="surplus"))
        noise = Event(EventKind.ATTEMPT_QUARANTINED, world.clock.now(), "test", {}, alert=True)
        history.write(connection, [Entry(noise)] * 20)
    surplus = status(world)["surplus"]
    assert surplus["totals"] == [{"currency": "USD", "count": 1, "amount": "9.99"}]
    assert surplus["attempts"][0]["attempt"] == "sub-1-p0-a1"
    assert "SURPLUS, to be given back: 1, 9.99 USD." in told("status")
    assert "SURPLUS: sub-1-p0-a1 took money" in told("explain", INVOICE)
    with store.transaction() as connection:
        connection.execute(update(tables.attempts).values(outcome="refunded"))
    assert status(world)["surplus"] == {"totals": [], "attempts": []}


def tokenised(world):
    record = {
        "reference_id": "card-1",
        "customer": {"reference_id": "cust-1"},
        "amount": "1.00",
        "currency": "USD",
    }
    page = start_tokenisation(world.ports, record)
    assert world.sandbox.pay_on_page(page["gateway_id"]).status == 200
    world.run_for(timedelta(minutes=2))
    return page


def test_a_tokenisation_that_moved_money_is_in_status(world, told):
    tokenised(world)
    assert status(world)["card_pages"] == [
        {"fate": "paid, card stored", "currency": "USD", "count": 1, "amount": "1.00"}
    ]
    assert "Card pages, paid, card stored: 1, 1.00 USD." in told("status")


def test_a_tokenisation_is_explained_by_its_reference_and_by_the_gateways_id(world, told):
    page = tokenised(world)
    by_reference = json.loads(told("explain", "card-1", "--json"))
    assert by_reference == json.loads(told("explain", page["gateway_id"], "--json"))
    assert by_reference["fate"] == "paid, card stored"
    assert [event["kind"] for event in by_reference["history"]] == [
        "card_page.opened", "card.stored",
    ]  # fmt: skip
    shown = told("explain", "card-1")
    assert "card-1: 1.00 USD, paid, card stored" in shown
    assert "POST /api/payment-invoices -> 20" in shown


# --- how it is printed ----------------------------------------------------------------------------


@pytest.mark.usefixtures("declined")
def test_a_truncated_answer_says_that_it_is(told):
    long = [line for line in told("explain", INVOICE).splitlines() if "got:" in line]
    assert any(line.endswith(" … (more with --json)") for line in long)
    assert all(len(line) < 400 for line in long)


def test_a_subscription_is_shown_in_words(world, told):
    world.subscribe("approved")
    world.subscribe(None, "sub-2")
    shown = told("subscriptions", "show", "sub-1")
    assert "card             on file, mask unknown" in shown
    assert "held             no" in shown
    assert "{" not in shown
    assert "card             -" in told("subscriptions", "show", "sub-2")
