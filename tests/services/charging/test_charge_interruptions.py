"""Charges that meet trouble: who is told, once, and what the history says of it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import get_args

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import DataError, IntegrityError, OperationalError, ProgrammingError
from structlog.testing import capture_logs

from billing_worker.domain.errors import ConcurrentChange, InvariantBroken
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import (
    Forbidden,
    NeverHandedOut,
    News,
    NoAnswer,
    NothingSent,
    Postponed,
    Resolved,
    Stated,
)
from billing_worker.domain.secret import Secret
from billing_worker.gateway.paycore import GatewaySettings, PaycoreGateway
from billing_worker.gateway.port import InstantOrder
from billing_worker.persistence import switches
from billing_worker.persistence.schema.tables import attempts, events, invoices
from billing_worker.persistence.store import Store
from billing_worker.services import kill_switch
from billing_worker.services.attempts import claim as claiming
from billing_worker.services.attempts.claim import claim
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.reconcile import poll_batch
from billing_worker.services.dunning import give_up_overdue
from billing_worker.services.subscriptions import lifecycle
from tests.support.world import World

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def alerts(world, kind):
    with world.store.reading() as connection:
        return connection.execute(
            select(events).where(events.c.kind == kind, events.c.alert).order_by(events.c.id)
        ).all()


def claimed(world):
    world.sweep()
    (message,) = world.bell.messages
    world.bell.messages.clear()
    return claim(world.ports, message[1]), message[1]


# --- the switch ---


def switch(world, *, on, service=None):
    kill_switch.switch(
        world.store, on=on, service=service, by="operator:ann", reason="r", now=world.clock.now()
    )


def test_a_night_with_sales_off_prepares_nothing_and_creates_nothing(world):
    world.subscribe("approved")
    switch(world, on=False)
    world.run_for(8 * HOUR, step=5 * MINUTE)
    assert world.attempts() == []
    assert world.transport.sent == []
    assert world.explain()["reason"] == "sales are switched off"
    assert world.events().count("invoice.waiting") == 1


def test_an_attempt_that_was_prepared_before_sales_went_off_is_left_alone_meanwhile(world):
    world.subscribe("approved")
    world.transport.unreachable = True
    world.tick()
    world.transport.unreachable = False
    switch(world, on=False)
    world.run_for(40 * MINUTE)
    assert world.attempts() == ["prepared"]
    assert world.transport.sent == []
    assert "attempt.claimed" not in world.events()


@pytest.mark.parametrize("service", [None, "payment_card_usd_hpp"])
def test_what_was_put_off_is_rung_for_as_soon_as_sales_are_on_again(world, service):
    world.subscribe("approved")
    switch(world, on=False, service=service)
    world.tick()
    world.clock.advance(5)
    switch(world, on=True, service=service)
    world.tick()
    assert world.fate() == "paid"


def test_turning_sales_off_returns_only_when_no_transaction_that_read_on_is_open(world):
    read, may_commit, returned = threading.Event(), threading.Event(), threading.Event()

    def arms():
        with world.store.transaction() as connection:
            assert switches.read(connection).sales_on
            read.set()
            assert may_commit.wait(20)

    def turns_off():
        switch(world, on=False)
        returned.set()

    arming = threading.Thread(target=arms)
    arming.start()
    assert read.wait(20)
    turning = threading.Thread(target=turns_off)
    turning.start()
    assert not returned.wait(0.5)
    may_commit.set()
    assert returned.wait(20)
    arming.join()
    turning.join()
    with world.store.reading() as connection:
        assert not switches.read(connection).sales_on


def test_a_stream_of_charges_on_postgresql_cannot_keep_sales_from_being_turned_off(postgres_url):
    """Readers that overlap without a gap: whoever comes after the switch waits for it."""
    store = Store(postgres_url)
    world = World(store)
    stop = threading.Event()

    def charges():
        while not stop.is_set():
            with world.store.transaction() as connection:
                switches.read(connection)
                time.sleep(0.02)

    readers = [threading.Thread(target=charges) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        switch(world, on=False)  # raises when it starves for the lock timeout
    finally:
        stop.set()
        for reader in readers:
            reader.join()
        store.close()


# --- the other test mode ---


def test_an_attempt_of_the_other_test_mode_ends_and_a_new_one_is_made_in_the_present_mode(world):
    world.subscribe("approved")
    world.transport.unreachable = True
    world.tick()
    world.transport.unreachable = False
    world.ports = world.ports_of_a_worker(test_mode=False)
    world.run_for(2 * HOUR)
    assert world.attempts() == ["not_charged", "succeeded"]
    assert world.sandbox.requests.for_reference("create", "sub-1-p0-a1") == 0
    with world.store.reading() as connection:
        modes = connection.execute(select(attempts.c.test_mode).order_by(attempts.c.number))
        assert list(modes.scalars()) == [True, False]


def test_an_invoice_that_was_created_in_the_other_test_mode_is_not_sold(world):
    world.subscribe("approved")
    claimed(world)  # … and the process dies right after its create:
    world.gateway().create(order_of_the_first_attempt(), [])
    world.ports = world.ports_of_a_worker(test_mode=False)
    world.run_for(HOUR)
    assert world.sales("sub-1-p0-a1") == 0
    assert world.attempts()[0] == "not_charged"
    assert "other test mode" in world.explain()["attempts"][0]["outcome"]


def order_of_the_first_attempt():
    return InstantOrder(
        reference_id="sub-1-p0-a1",
        money=Money.from_minor(999, "USD"),
        test_mode=True,
        card_token=Secret("approved"),
        customer_reference_id="customer-of-sub-1",
    )


# --- money that moved twice ---


def test_two_paid_invoices_of_one_attempt_are_told_to_a_person_by_name(store):
    world = World(store)
    world.subscribe("approved")
    world.transport.unreachable = True
    world.tick()
    world.transport.unreachable = False
    gateway = world.gateway()
    made = [gateway.create(order_of_the_first_attempt(), []) for _ in range(2)]
    for statement in made:
        gateway.sale(statement.bearer, [])
    with capture_logs() as logs:
        world.run_for(10 * MINUTE)
    assert world.fate() == "paid"
    (alert,) = [a for a in alerts(world, "attempt.quarantined") if "more than once" in str(a.data)]
    assert all(statement.gateway_id in alert.data["evidence"] for statement in made)
    assert [line for line in logs if "more than once" in str(line.get("details"))]


# --- who refuses us ---


def test_credentials_that_are_refused_are_one_alert_in_ten_minutes_whatever_is_due(world):
    for number in range(5):
        world.subscribe("approved", f"sub-{number}")
    strangers = PaycoreGateway(
        world.transport,
        world.clock,
        GatewaySettings(
            api_url="https://gateway.test/api",
            cardgate_url="https://cardgate.test",
            username=world.sandbox.username,
            password=Secret("not ours"),
        ),
    )
    mended, world.ports = world.ports, world.ports_of_a_worker(gateway=strangers)
    with capture_logs() as logs:
        world.tick()
    told = [line for line in logs if line["event"] == "billing.alert"]
    assert [line["kind"] for line in told] == ["gateway.refuses_us"]
    assert len(alerts(world, "gateway.refuses_us")) == 1
    world.run_for(18 * MINUTE)
    assert len(alerts(world, "gateway.refuses_us")) == 2
    world.ports = mended
    world.run_for(10 * MINUTE)
    assert {world.fate(f"sub-{number}-p0") for number in range(5)} == {"paid"}


# --- news of a claim that was replaced ---

EVERY_NEWS = {
    Stated: None,
    NothingSent: NothingSent("said late"),
    Postponed: Postponed("said late"),
    Forbidden: Forbidden("card.dead", "said late", None),
    NoAnswer: NoAnswer("said late"),
    NeverHandedOut: NeverHandedOut(),
    Resolved: None,  # a person's word, and of no claim
}


def test_every_kind_of_news_is_known_here():
    assert set(EVERY_NEWS) == set(get_args(News))


@pytest.mark.parametrize("sold", [False, True], ids=["prepared", "submitted"])
@pytest.mark.parametrize(
    "news", [n for n in EVERY_NEWS.values() if n], ids=lambda n: type(n).__name__
)
def test_the_word_of_a_claim_that_was_replaced_is_dropped_whatever_it_says(world, news, sold):
    world.subscribe("approved_later")
    (old,), ids = claimed(world)
    world.clock.advance(world.ports.timings.stuck_after)
    if sold:
        world.run("charge", ids)
    else:
        claim(world.ports, ids)
    before = world.explain()
    with pytest.raises(ConcurrentChange):
        settle(world.ports, Settle(old.key, news, "charge", fence=old.attempt.fence))
    assert world.explain() == before


# --- frames that ended without a word ---


def test_the_next_claim_tells_how_many_frames_ended_without_a_word_and_when(world):
    world.subscribe("approved")
    (died,), ids = claimed(world)
    world.clock.advance(world.ports.timings.stuck_after)
    world.run("charge", ids)
    (event,) = [e for e in world.explain()["history"] if e["kind"] == "attempt.claimed"]
    assert event["data"]["claims_without_a_word"] == 1
    assert event["data"]["the_last_until"] == died.attempt.lease_until.isoformat()


def test_a_claim_after_one_that_gave_the_attempt_back_is_no_event(world):
    world.subscribe("approved")
    world.transport.unreachable = True
    world.tick()
    world.transport.unreachable = False
    world.run_for(MINUTE, step=timedelta(seconds=15))
    assert world.fate() == "paid"
    assert "attempt.claimed" not in world.events()


@pytest.mark.parametrize(("error", "alert"), [
    (OperationalError, False),
    (IntegrityError, True),
    (DataError, True),
    (ProgrammingError, True),
])  # fmt: skip
def test_only_a_database_that_is_away_is_an_outage_and_anything_else_is_our_bug(
    world, error, alert
):
    world.subscribe("approved")

    def fail(_request):
        raise error("SELECT 1", {}, Exception("said the database"))

    world.transport.before_send = fail
    with capture_logs() as logs:
        world.tick()
    kinds = [line["kind"] for line in logs if line["event"] == "billing.alert"]
    assert kinds == (["charge.crashed"] if alert else [])
    assert bool([line for line in logs if line["event"] == "charge.interrupted"]) is not alert


def test_a_broken_invariant_in_a_poll_is_an_alert(world):
    world.subscribe("approved_later")
    world.tick()

    def fail(_request):
        raise InvariantBroken("seen in a test")

    world.transport.before_send = fail
    world.clock.advance(MINUTE)
    world.sweep()
    (message,) = [m for m in world.bell.messages if m[0] == "poll"]
    with capture_logs() as logs:
        assert poll_batch(world.ports, message[1]) == {"crashed": 1}
    assert [line["kind"] for line in logs if line["event"] == "billing.alert"] == [
        "reconcile.crashed"
    ]


def test_a_row_that_kills_its_workers_is_logged_as_an_alert(world, monkeypatch):
    monkeypatch.setattr(claiming, "MAX_CLAIMS", 2)
    world.subscribe("approved")
    _, ids = claimed(world)
    with capture_logs() as logs:
        for _ in range(2):
            world.clock.advance(world.ports.timings.stuck_after)
            claim(world.ports, ids)
    (alert,) = [line for line in logs if line["event"] == "billing.alert"]
    assert alert["details"] == {"reason": "keeps_crashing: its worker died 2 times"}
    assert alert["log_level"] == "error"


# --- what need not be said again ---


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
def test_a_gateway_that_is_away_for_a_day_is_told_once_an_hour(world):
    world.subscribe("approved")
    world.transport.unreachable = True
    world.run_for(20 * HOUR, step=5 * MINUTE)
    told = [e for e in world.explain()["history"] if e["kind"] == "attempt.postponed"]
    assert 15 <= len(told) <= 21
    assert told[-1]["data"]["unchanged_since"] == told[0]["at"]


def test_an_outcome_that_changes_is_told_at_once(world):
    world.subscribe("answer_lost_before")
    world.run_for(30 * MINUTE, step=MINUTE)
    told = [e["data"] for e in world.explain()["history"] if e["kind"] == "attempt.looked"]
    assert [data["found"] for data in told] == ["no answer", "process_pending"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
def test_an_attempt_that_is_undecided_for_a_day_is_told_to_a_person_once(world):
    world.subscribe("approved")
    world.transport.unreachable = True
    with capture_logs() as logs:
        world.run_for(3 * DAY, step=30 * MINUTE)
    (alert,) = alerts(world, "attempt.undecided")
    with world.store.reading() as connection:
        prepared_at = connection.execute(select(attempts.c.created_at)).scalar_one()
    age = alert.at - prepared_at
    assert DAY <= age <= DAY + HOUR
    assert alert.data["reference_id"] == "sub-1-p0-a1"
    assert [line for line in logs if line.get("kind") == "attempt.undecided"]


def test_the_history_of_a_charge_that_succeeds_costs_no_extra_question(world, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "billing_worker.persistence.history.last_of", lambda *_: asked.append(1) or {}
    )
    world.subscribe("approved")
    world.tick()
    assert world.fate() == "paid"
    assert asked == []


# --- the card's token ---


@pytest.mark.parametrize("operation", ["create", "sale", "look"])
def test_a_token_that_the_gateway_echoes_in_free_text_is_not_in_the_history(world, operation):
    token = "approved.never-write-this-down"
    send = world.transport.send

    def echo(request, *, moves_money):
        response = send(request, moves_money=moves_money)
        which = "sale" if moves_money else {"POST": "create", "GET": "look"}[request.method]
        if which != operation:
            return response
        body = response.body.rstrip().removesuffix(b"}")
        return replace(response, body=body + b', "message": "card ' + token.encode() + b' is new"}')

    world.transport.send = echo
    world.subscribe(token)
    world.tick()
    with world.store.reading() as connection:
        assert connection.execute(select(func.count()).select_from(events)).scalar_one() > 0
        told = [str(row.data) for row in connection.execute(select(events.c.data))]
    assert world.fate() == "paid"
    assert not [text for text in told if "never-write-this-down" in text]


def test_what_a_poll_found_is_still_explained(world):
    world.subscribe("approved")
    world.tick()
    (poll,) = [
        call
        for event in world.explain()["history"]
        for call in event["data"].get("calls", ())
        if call["operation"] == "look"
    ]
    assert '"status": "processed"' in poll["answer"]
    assert '"amount": 9.99' in poll["answer"]


# --- earlier attempts ---


def test_a_slow_answer_that_an_earlier_attempt_is_undecided_keeps_the_next_one_from_being_sold(
    world,
):
    """The books drop the answer, because another process has heard "declined" while it was under
    way: that one was asked later, but answered earlier.
    """
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=10_000_000)
    world.subscribe("decline_insufficient_funds")
    world.tick()
    [invoice] = world.sandbox._books.with_reference("sub-1-p0-a1")

    def overtaken(request):
        if request.method == "GET" and invoice.gateway_id in request.url:
            with world.store.transaction() as connection:
                heard = {"heard_at": world.clock.now() + timedelta(seconds=1)}
                connection.execute(update(attempts).where(attempts.c.number == 1).values(heard))
            invoice.status = "process_pending"
            world.clock.advance(5)

    world.clock.advance(4 * DAY)
    world.sweep()
    world.bell.messages = [m for m in world.bell.messages if m[0] == "charge"]
    world.transport.before_send = overtaken
    world.deliver()
    assert world.sales("sub-1-p0-a2") == 0
    assert world.attempts() == ["declined", "prepared"]
    assert "undecided again" in world.explain()["why"]


# --- rows of another version ---


@pytest.mark.parametrize("missed", [False, True])
def test_an_invoice_that_cannot_be_read_keeps_no_other_of_its_page_from_being_charged(
    world, missed
):
    for number in (1, 2, 3):
        world.subscribe("approved", f"sub-{number}")
    world.sweep()
    with world.store.transaction() as connection:
        broken = update(invoices).where(invoices.c.reference_id == "sub-2-p0")
        connection.execute(broken.values(next_origin="from_the_future"))
    if missed:
        world.clock.advance(2 * HOUR)
    world.run_for(3 * HOUR, step=10 * MINUTE)
    assert world.debits() == {"sub-1-p0": 1, "sub-3-p0": 1}
    [told] = alerts(world, "invoice.waiting")
    assert "cannot be read: ValueError: 'from_the_future'" in told.data["reason"]
    with world.store.transaction() as connection:
        connection.execute(broken.values(next_origin="scheduled"))
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert world.fate("sub-2-p0") == "paid"


def test_a_subscription_with_an_invoice_that_cannot_be_read_is_cancelled_all_the_same(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    with world.store.transaction() as connection:
        connection.execute(update(invoices).values(next_origin="from_the_future"))
    lifecycle.cancel(world.store, world.clock, "sub-1", at_period_end=False, by="test")
    with world.store.transaction() as connection:
        connection.execute(update(invoices).values(next_origin="scheduled"))
    world.run_for(30 * DAY, step=12 * HOUR)
    assert world.sales("sub-1-p0-a2") == 0


def test_an_invoice_that_cannot_be_read_keeps_no_other_from_being_given_up(world):
    for number in (1, 2):
        world.subscribe("decline_card_expired", f"sub-{number}")
    world.tick()
    with world.store.transaction() as connection:
        first = update(invoices).where(invoices.c.reference_id == "sub-1-p0")
        connection.execute(first.values(next_origin="from_the_future"))
    world.clock.advance(90 * DAY)
    assert give_up_overdue(world.store, world.clock) == 1
    assert give_up_overdue(world.store, world.clock) == 0
    assert world.explain("sub-2-p0")["status"] != "open"


def test_a_poll_that_crashes_is_not_repeated_at_every_sweep(world):
    world.subscribe("approved_later")
    world.tick()
    with world.store.transaction() as connection:
        connection.execute(update(invoices).values(next_origin="from_the_future"))
    world.transport.sent.clear()
    world.run_for(30 * MINUTE, step=timedelta(seconds=20))
    assert 2 <= len(world.transport.sent) <= 4
    with world.store.transaction() as connection:
        connection.execute(update(invoices).values(next_origin="scheduled"))
    world.run_for(15 * MINUTE)
    assert world.fate() == "paid"


# --- the next attempt, when an earlier one turns out paid, or undecided ---


@pytest.mark.parametrize(("turns", "fate"), [("processed", "paid"), ("process_pending", "unknown")])
def test_a_prepared_attempt_whose_worker_died_ends_when_an_earlier_one_pays_or_may(
    world, turns, fate
):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=10_000_000)
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.clock.advance(4 * DAY)
    world.sweep()
    [due] = [ids for kind, ids in world.bell.messages if kind == "charge"]
    world.bell.messages.clear()
    claim(world.ports, due)
    assert world.attempts() == ["declined", "prepared"]
    [invoice] = world.sandbox._books.with_reference("sub-1-p0-a1")
    if turns == "processed":
        world.sandbox._books.acquirer.charge(invoice, world.clock.now())
    invoice.status = turns
    poll_batch(world.ports, [1])
    assert world.attempts()[1] == "not_charged"
    assert world.fate() == fate
