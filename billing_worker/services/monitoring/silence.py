"""Notices that nobody works: every sweep records when it has finished.

A sweep needs a beat that sends it, a broker that carries it, a worker that runs it and a database
that answers. So one old record tells of any of them. A sweep finishes whether or not it has found
anything: a quiet night and an empty database are not silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection

from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import counters, history, sweep_runs
from billing_worker.persistence.book import identity as book
from billing_worker.persistence.history import Entry
from billing_worker.services.ports import Ports

log = structlog.get_logger()

INTERVALS = 3
"""A sweep is silent only after this many of its own intervals: one may be late or lost."""

RESUMED = "work.resumed"
"""The counter of silences that have ended."""

RECORD_EVERY = timedelta(seconds=10)
"""Sweeps that run each second write no row each second."""


@dataclass(frozen=True, slots=True)
class Silent:
    """A sweep that has not finished for too long."""

    sweep: str
    since: datetime
    """When it last finished; of one that never has, when the book was made."""


def record_run(ports: Ports, sweep: str) -> None:
    """Record that a sweep has finished. The first one after a silence reports how long it was."""
    now = ports.clock.now()
    with ports.store.reading() as connection:
        finished = sweep_runs.last(connection).get(sweep)
    if finished is not None and finished <= now < finished + RECORD_EVERY:
        return
    with ports.store.transaction() as connection:
        since = sweep_runs.newest(connection)
        sweep_runs.add(connection, sweep, now)
        if since is None or now - since <= ports.timings.silence:
            return
        if not counters.add_unless_recent(connection, RESUMED, now, since):
            return  # another worker has reported this silence
        data = {"silent_since": since.isoformat(), "seconds": int((now - since).total_seconds())}
        event = Event(EventKind.WORK_RESUMED, now, sweep, data, alert=True)
        history.write(connection, [Entry(event)])
    log.error("billing.alert", kind=str(EventKind.WORK_RESUMED), **data)


def silent_sweeps(
    connection: Connection, intervals: Mapping[str, int], now: datetime, max_age: timedelta
) -> list[Silent]:
    """Return the sweeps that have not finished within `max_age`, the most overdue first.

    `intervals`: seconds between two runs, by sweep. A sweep may always miss some of its own
    intervals (INTERVALS), however short `max_age` is.
    """
    finished = sweep_runs.last(connection)
    made_at = book.read(connection).made_at
    found = [
        Silent(sweep, since)
        for sweep, allowed in allowed_ages(intervals, max_age).items()
        if now - (since := finished.get(sweep, made_at)) > allowed
    ]
    return sorted(found, key=lambda silent: silent.since)


def allowed_ages(intervals: Mapping[str, int], max_age: timedelta) -> dict[str, timedelta]:
    """Return by sweep how long it may not have finished. `intervals`: seconds between two runs."""
    return {
        sweep: max(max_age, INTERVALS * timedelta(seconds=seconds))
        for sweep, seconds in intervals.items()
    }
