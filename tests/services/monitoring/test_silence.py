"""Virtual time: whatever stops the work, the sweeps stop recording that they have finished."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select, update

from billing_worker.config import load
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.persistence.schema import tables
from billing_worker.services.monitoring.silence import record_run, silent_sweeps
from tests.entrypoints.test_config import GOOD

SWEEPS = intervals(load(GOOD))
OFTEN = [sweep for sweep, seconds in SWEEPS.items() if seconds <= 60]
HOURLY = ["billing.forget_events", "billing.warn_expiring"]


@pytest.fixture(autouse=True)
def migrated_now(world):
    with world.store.transaction() as connection:
        connection.execute(update(tables.book).values(made_at=world.clock.now()))


@pytest.fixture
def runs(world):
    """All sweeps, or some, finish now."""

    def runs(*sweeps):
        for sweep in sweeps or SWEEPS:
            record_run(world.ports, sweep)

    return runs


@pytest.fixture
def silent(world):
    def silent(minutes=10):
        with world.store.reading() as connection:
            found = silent_sweeps(connection, SWEEPS, world.clock.now(), timedelta(minutes=minutes))
        return [one.sweep for one in found]

    return silent


def reported(world):
    query = select(tables.events).where(tables.events.c.kind == "work.resumed")
    with world.store.reading() as connection:
        return connection.execute(query).all()


def test_a_night_in_which_sweeps_find_nothing_is_not_silent(world, runs, silent):
    for _ in range(100):
        runs()
        world.clock.advance(timedelta(minutes=5))
        assert silent() == []
    assert reported(world) == []


def test_a_beat_that_has_died_is_noticed_after_ten_minutes(world, runs, silent):
    runs()
    world.clock.advance(timedelta(minutes=10))
    assert silent() == []
    world.clock.advance(1)
    assert sorted(silent()) == sorted(OFTEN)


def test_one_sweep_that_stops_is_named_while_the_others_run(world, runs, silent):
    runs()
    world.clock.advance(timedelta(minutes=11))
    runs(*(sweep for sweep in SWEEPS if sweep != "billing.ring"))
    assert silent() == ["billing.ring"]


def test_a_sweep_that_runs_hourly_is_silent_after_three_hours(world, runs, silent):
    runs()
    world.clock.advance(timedelta(hours=3))
    runs(*OFTEN)
    assert not set(HOURLY) & set(silent())
    world.clock.advance(1)
    assert set(silent()) == {"billing.give_up", "billing.announce", *HOURLY}


def test_workers_that_never_start_are_noticed_from_the_migration_on(world, silent):
    world.clock.advance(timedelta(minutes=11))
    assert sorted(silent()) == sorted(OFTEN)


def test_a_deploy_of_five_minutes_is_not_reported(world, runs):
    runs()
    world.clock.advance(timedelta(minutes=5))
    runs()
    assert reported(world) == []


def test_the_first_sweep_after_a_silence_reports_once_how_long_it_was(world, runs):
    runs()
    world.clock.advance(timedelta(days=6))
    runs()
    runs()
    [event] = reported(world)
    assert event.alert
    assert event.data["seconds"] == 6 * 86_400


def test_a_second_silence_is_reported_too(world, runs):
    runs()
    for _ in range(2):
        world.clock.advance(timedelta(hours=1))
        runs()
    assert len(reported(world)) == 2


def test_a_worker_whose_record_arrives_late_does_not_make_a_sweep_older(world, runs, silent):
    runs()
    world.clock.advance(timedelta(minutes=-30))
    runs()
    world.clock.advance(timedelta(minutes=35))
    assert silent() == []
