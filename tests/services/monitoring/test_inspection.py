"""The sweep that asks whether the invariants hold: when, how much, and whom it tells."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import literal_column, select, update
from sqlalchemy.exc import DBAPIError

from billing_worker.config import load
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.persistence import counters, sweep_runs
from billing_worker.persistence.invariants import breaches
from billing_worker.persistence.invariants.asking import Question
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.services.dunning import choose_policy
from billing_worker.services.monitoring import inspection
from billing_worker.services.monitoring.inspection import inspect
from billing_worker.services.monitoring.invariants import INVARIANTS, Invariant
from billing_worker.services.monitoring.silence import RESUMED
from billing_worker.services.outbox.publish import publish
from billing_worker.services.subscriptions import lifecycle
from tests.entrypoints.test_config import GOOD
from tests.support.contradictions import contradictions
from tests.support.world import START

SWEEPS = intervals(load(GOOD))
DAY = timedelta(days=1)


@pytest.fixture
def world(world):
    """Its books are made to contradict the gateway's: that is mended before they are compared."""
    yield world
    with world.store.transaction() as connection:
        connection.execute(update(tables.attempts).values(currency="USD"))


def _in_currency(world, attempt, currency):
    named = tables.attempts.c.reference_id == attempt
    with world.store.transaction() as connection:
        connection.execute(update(tables.attempts).where(named).values(currency=currency))


def _alerts(world):
    query = select(tables.events.c.data).where(tables.events.c.kind == "invariant.broken")
    with world.store.reading() as connection:
        return connection.execute(query.order_by(tables.events.c.id)).scalars().all()


def _next_minute(world):
    world.clock.advance(60)
    return inspect(world.ports, SWEEPS)


def test_a_breach_alerts_once_with_the_command_to_look_and_again_after_it_was_mended(world):
    world.subscribe("approved")
    world.tick()
    assert inspect(world.ports, SWEEPS) == 0
    _in_currency(world, "sub-1-p0-a1", "EUR")
    assert inspect(world.ports, SWEEPS) == 0, "its interval of a minute is not over"
    assert [_next_minute(world) for _ in range(3)] == [1, 0, 0]
    [told] = _alerts(world)
    assert told["invariant"] == "paid_once_and_in_full"
    assert told["broken_by"] == ["sub-1-p0"]
    assert told["look"] == "billing-worker explain sub-1-p0"
    _in_currency(world, "sub-1-p0-a1", "USD")
    assert _next_minute(world) == 0
    with world.store.reading() as connection:
        assert breaches.counts(connection) == {}
    _in_currency(world, "sub-1-p0-a1", "EUR")
    assert _next_minute(world) == 1
    assert len(_alerts(world)) == 2


def test_a_table_of_many_slices_is_asked_about_in_turn_and_forgets_no_breach(world, monkeypatch):
    for number in range(5):
        world.subscribe("approved", f"sub-{number}")
    world.tick()
    monkeypatch.setattr(inspection, "SLICE", 2)
    _in_currency(world, "sub-4-p0-a1", "EUR")
    assert sum(_next_minute(world) for _ in range(3)) == 1
    assert sum(_next_minute(world) for _ in range(6)) == 0, "it is told of once"
    with world.store.reading() as connection:
        assert breaches.counts(connection) == {"paid_once_and_in_full": 1}


def test_after_a_silence_late_work_is_no_breach_until_it_had_time_to_catch_up(world):
    world.subscribe("approved")
    with world.store.transaction() as connection:
        sweep_runs.add(connection, "billing.renew", world.clock.now())
    world.clock.advance(3 * DAY)
    assert inspect(world.ports, SWEEPS) == 0, "no sweep has finished for three days"
    with world.store.transaction() as connection:
        sweep_runs.add(connection, "billing.renew", world.clock.now())
        counters.add(connection, RESUMED, 1, world.clock.now())
    assert _next_minute(world) == 0
    world.clock.advance(timedelta(minutes=20))
    with world.store.transaction() as connection:
        sweep_runs.add(connection, "billing.renew", world.clock.now())
    publish(world.store, world.clock)
    assert _next_minute(world) == 1, "renew finishes and opens nothing"
    assert _alerts(world)[0]["invariant"] == "due_period_is_opened"


def test_a_question_that_fails_stops_no_other_and_the_sweep_does_not_count_as_finished(
    world, monkeypatch
):
    world.subscribe("approved")
    world.tick()
    _in_currency(world, "sub-1-p0-a1", "EUR")
    nonsense = Question(select(literal_column("nonsense").label("id")))
    bad = Invariant("cannot_be_asked", "It cannot be asked.", nonsense)
    monkeypatch.setattr(inspection, "INVARIANTS", (bad, *INVARIANTS))
    with pytest.raises(DBAPIError):
        inspect(world.ports, SWEEPS)
    with world.store.reading() as connection:
        assert breaches.counts(connection) == {"paid_once_and_in_full": 1}
        assert breaches.runs(connection).keys() == {one.name for one in INVARIANTS}


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda one: one.name)
def test_a_question_reads_no_whole_table(sqlite_url, invariant):
    parameters = {"before": START, "day_ago": START, "month_ago": START, "first": 1, "last": 9}
    question = invariant.question.breaks.params(parameters)
    with Store(sqlite_url) as store, store.reading() as connection:
        compiled = question.compile(connection, compile_kwargs={"literal_binds": True})
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}").all()
    scans = [row[-1] for row in plan if row[-1].startswith("SCAN")]
    # An index of unfinished rows may be read whole; of the book there is one row.
    assert set(scans) <= {"SCAN attempts USING INDEX uq_attempts_one_live", "SCAN book"}


def test_a_cancellation_of_another_subscription_raises_no_alarm(world):
    """The end of the ladder cancels sub-2, which leaves no entry of a person's cancellation."""
    world.subscribe("approved")
    world.subscribe("decline_insufficient_funds", "sub-2")
    choose_policy(world.store, world.clock, subscription_reference="sub-2", policy="classic",
                  by="ann", why="asked")  # fmt: skip
    world.tick()
    lifecycle.cancel(world.store, world.clock, "sub-1", at_period_end=False, by="ann")
    world.run_for(timedelta(days=25), step=timedelta(hours=12))
    assert world.fate("sub-2-p0") == "uncollectible"
    assert contradictions(world.store, world.clock.now(), at_rest=False) == []
