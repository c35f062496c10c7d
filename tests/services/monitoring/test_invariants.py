"""Each corruption of the books, made by hand, is found by its own invariant and by no other."""

from __future__ import annotations

import re
import shutil
from datetime import timedelta

import pytest
from sqlalchemy import delete, insert, select, text, update

from billing_worker.config import load
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.persistence.schema import tables
from billing_worker.persistence.schema.outgoing import outbox
from billing_worker.persistence.store import Store, Within
from billing_worker.services.monitoring.inspection import Leeway, report
from billing_worker.services.monitoring.invariants import INVARIANTS
from billing_worker.services.outbox.publish import publish
from tests.entrypoints.test_config import GOOD
from tests.support.lifecycle import do
from tests.support.processes import ROOT
from tests.support.world import World

SWEEPS = intervals(load(GOOD))
DAY = timedelta(days=1)
invoices, attempts, subscriptions = tables.invoices, tables.attempts, tables.subscriptions


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def database_url(request, tmp_path_factory):
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("invariants") / "billing.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
    else:
        server = request.getfixturevalue("postgres")
        with server.temporary_database(template="template_billing") as url:
            yield url


@pytest.fixture(scope="module")
def book(database_url):
    """A world with a bit of everything: paid, declined for good and for now, unknown, paused, cancelled."""
    with Store(database_url) as store:
        world = World(store)
        world.subscribe("approved", "paid")
        world.subscribe("decline_card_is_stolen", "dead-card")
        world.subscribe("decline_insufficient_funds", "declined")
        world.subscribe("approved", "paused")
        world.subscribe("approved", "cancelled")
        world.subscribe("pending_forever", "unknown")
        world.run_for(timedelta(minutes=3))
        world.clock.advance(31 * DAY)
        world.run_for(timedelta(minutes=3))
        do(world, "pause", "paused")
        do(world, "cancel", "cancelled", at_period_end=False)
        world.transport.unreachable = True
        world.subscribe("approved", "unreachable")
        world.run_for(timedelta(minutes=30))  # its attempt is prepared, and stays so
        publish(store, world.clock)
        yield world


# --- corruptions: each takes the connection and the time -----------------------------------------


def _invoice(reference, **values):
    return lambda connection, now: connection.execute(
        update(invoices).where(invoices.c.reference_id == reference).values(_dated(values, now))
    )


def _attempt(reference, **values):
    return lambda connection, now: connection.execute(
        update(attempts).where(attempts.c.reference_id == reference).values(_dated(values, now))
    )


def _subscription(reference, **values):
    named = subscriptions.c.reference_id == reference
    return lambda connection, now: connection.execute(
        update(subscriptions).where(named).values(_dated(values, now))
    )


def _dated(values, now):
    return {k: now + v if isinstance(v, timedelta) else v for k, v in values.items()}


def _copied(connection, table, row, **changes):
    values = {c.name: row._mapping[c.name] for c in table.c if c.name != "id"} | changes
    return connection.execute(insert(table).values(values).returning(table.c.id)).scalar_one()


def _row(connection, table, reference):
    return connection.execute(select(table).where(table.c.reference_id == reference)).one()


def _another_attempt(connection, of, number, **changes):
    row = _row(connection, attempts, of)
    new = {"number": number, "reference_id": f"{of}-{number}", "gateway_id": f"g-{of}-{number}"}
    return row, _copied(connection, attempts, row, **(new | {"page_digest": None} | changes))


def a_second_live_attempt(connection, _):
    connection.execute(text("DROP INDEX uq_attempts_one_live"))
    _another_attempt(connection, "unreachable-p0-a1", 2)


def a_lost_statement(connection, _):
    _rewrite_history(connection)
    paid = _row(connection, attempts, "paid-p0-a1").id
    events = tables.events
    connection.execute(
        delete(events).where(events.c.attempt_id == paid, events.c.kind == "attempt.succeeded")
    )


def _rewrite_history(connection):
    if connection.dialect.name == "postgresql":
        connection.execute(text("ALTER TABLE events DISABLE TRIGGER events_append_only"))
    else:
        connection.execute(text("DROP TRIGGER events_no_delete"))


def _submitted_event(connection):
    return connection.execute(
        select(tables.events).where(tables.events.c.kind == "attempt.submitted").limit(1)
    ).one()


def a_second_submission(connection, _):
    _copied(connection, tables.events, _submitted_event(connection))


def _charged_now(reference):
    def corrupt(connection, now):
        row, attempt = _another_attempt(connection, f"{reference}-p1-a1", 2, status="not_charged")
        subscription = _row(connection, subscriptions, reference).id
        about = {"subscription_id": subscription, "invoice_id": row.invoice_id}
        event = _submitted_event(connection)
        _copied(connection, tables.events, event, attempt_id=attempt, at=now, **about)

    return corrupt


def a_lost_period(connection, _):
    """The middle one of three: an invoice that is gone without a trace."""
    row = _row(connection, invoices, "paid-p1")
    connection.execute(delete(attempts).where(attempts.c.invoice_id == row.id))
    connection.execute(delete(invoices).where(invoices.c.id == row.id))
    end = row.period_end + (row.period_end - row.period_start)
    _copied(
        connection,
        invoices,
        row,
        reference_id="paid-p2",
        period_number=2,
        period_start=row.period_end,
        period_end=end,
        status="open",
        paid_at=None,
        reason="made by hand",
    )


def another_customers_card(connection, _):
    other = _row(connection, subscriptions, "declined").card_id
    _subscription("paid", card_id=other)(connection, _)


def another_customers_card_charged(connection, _):
    other = _row(connection, subscriptions, "unknown").card_id
    _attempt("paid-p0-a1", card_id=other)(connection, _)


def a_dead_card_that_is_usable(connection, _):
    card = _row(connection, subscriptions, "dead-card").card_id
    connection.execute(
        update(tables.cards).where(tables.cards.c.id == card).values(unusable_reason=None)
    )


def too_many_declines(connection, now):
    for number in range(10, 21):
        _another_attempt(connection, "declined-p1-a1", number, submitted_at=now, next_poll_at=None)


def an_old_event_without_a_number(connection, now):
    row = {"at": now - DAY, "type": "invoice.paid", "stream": 1, "details": {}}
    connection.execute(insert(outbox).values(row))


NO_STEP = {"next_attempt_at": None, "enqueue_at": None, "give_up_at": None}
CORRUPTIONS = [
    ("due_period_is_opened", _subscription("paid", next_billing_at=-DAY)),
    ("due_invoice_wakes_a_worker", _invoice("declined-p1", enqueue_at=-DAY)),
    ("due_poll_wakes_a_worker", _attempt("unknown-p0-a1", next_poll_at=-DAY)),
    ("event_gets_its_number", an_old_event_without_a_number),
    ("submitted_is_polled", _attempt("unknown-p0-a1", next_poll_at=None)),
    ("prepared_goes_on", _invoice("unreachable-p0", enqueue_at=None, reason=None)),
    ("one_live_attempt", a_second_live_attempt),
    ("open_invoice_goes_on", _invoice("declined-p1", **NO_STEP, reason=None)),
    ("open_invoice_goes_on", _invoice("declined-p1", enqueue_at=None)),
    ("billed_subscription_has_a_date", _subscription("paid", next_billing_at=None)),
    ("paid_once_and_in_full", _attempt("paid-p0-a1", amount_minor=1)),
    ("paid_once_and_in_full", _attempt("paid-p0-a1", currency="EUR")),
    ("paid_once_and_in_full", _invoice("declined-p1", **NO_STEP, status="paid", paid_at=DAY)),
    (
        "payment_pays",
        _invoice("paid-p0", status="open", paid_at=None, next_attempt_at=DAY, enqueue_at=DAY),
    ),
    ("payment_has_evidence", a_lost_statement),
    ("submitted_once", a_second_submission),
    ("surplus_is_told", _attempt("declined-p1-a1", status="surplus")),
    ("one_mode", _attempt("paid-p0-a1", test_mode=False)),
    ("cancelled_is_not_charged", _charged_now("cancelled")),
    ("paused_is_not_charged", _charged_now("paused")),
    ("periods_follow_one_another", a_lost_period),
    ("periods_follow_one_another", _invoice("paid-p1", period_start=-DAY)),
    ("who_gave_it_up_is_told", _invoice("declined-p1", **NO_STEP, status="void")),
    ("who_gave_it_up_is_told", _invoice("declined-p1", **NO_STEP, status="uncollectible")),
    ("who_stopped_it_is_told", _subscription("paid", status="cancelled", next_billing_at=None)),
    ("card_of_the_customer_is_charged", another_customers_card_charged),
    ("card_of_the_customer_is_chosen", another_customers_card),
    ("refused_card_is_dead", a_dead_card_that_is_usable),
    ("network_limits_hold", too_many_declines),
]


@pytest.fixture
def broken(book):
    """What the whole report finds after a corruption, by invariant; the corruption is undone."""

    def broken(corrupt):
        now, leeway = book.clock.now(), Leeway(book.ports.timings, SWEEPS)
        with book.store.engine.connect() as connection:
            transaction = connection.begin()
            corrupt(connection, now)
            findings = report(Within(connection), leeway, now)
            transaction.rollback()
        return {one.invariant.name: one.broken for one in findings if one.broken}

    return broken


def test_a_book_in_order_breaks_nothing(broken):
    assert broken(lambda *_: None) == {}


@pytest.mark.parametrize(("invariant", "corrupt"), CORRUPTIONS)
def test_a_corruption_is_found_by_its_own_invariant_only(broken, invariant, corrupt):
    found = broken(corrupt)
    assert found.keys() == {invariant}
    assert len(found[invariant]) == 1


def test_the_page_lists_every_invariant_with_its_sentence():
    page = (ROOT / "docs" / "monitoring.md").read_text().partition("<!-- invariants -->")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(one.name, one.says) for one in INVARIANTS]


def test_every_invariant_has_a_corruption_that_it_finds():
    assert {name for name, _ in CORRUPTIONS} == {one.name for one in INVARIANTS}
