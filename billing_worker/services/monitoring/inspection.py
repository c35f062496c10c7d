"""Asks the books whether the invariants hold, and tells of each breach once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.timings import Timings
from billing_worker.persistence import counters, history, sweep_runs, switches
from billing_worker.persistence.history import Entry
from billing_worker.persistence.invariants import breaches
from billing_worker.persistence.invariants.asking import ask, last_id
from billing_worker.persistence.invariants.breaches import Run
from billing_worker.persistence.store import Store
from billing_worker.services.monitoring.invariants import INVARIANTS, Invariant
from billing_worker.services.monitoring.silence import RESUMED, allowed_ages
from billing_worker.services.ports import Ports

log = structlog.get_logger()

BY = "invariants"

SLICE: Final = 20_000
"""Rows of one run of a question over a whole table. A smaller table is read whole each time."""

NAMED: Final = 20
"""References in one alert."""


@dataclass(frozen=True, slots=True)
class Leeway:
    """How late work may be, and whether it can be judged now. `intervals`: seconds by sweep."""

    timings: Timings
    intervals: Mapping[str, int]

    def of(self, invariant: Invariant) -> timedelta:
        if invariant.done_by is None:
            return timedelta(0)
        return 2 * allowed_ages(self.intervals, self.timings.silence)[invariant.done_by]

    def why_not_judged(
        self, connection: Connection, invariant: Invariant, now: datetime
    ) -> str | None:
        """Return why lateness means nothing now, or None. After a silence all work is late."""
        if invariant.done_by is None:
            return None
        newest = sweep_runs.newest(connection)
        if newest is not None and newest < now - self.timings.silence:
            return f"no sweep has finished since {newest.isoformat()}"
        resumed = counters.last_counted(connection, RESUMED)
        if resumed is not None and resumed > now - self.of(invariant):
            return f"work began again at {resumed.isoformat()} and catches up"
        if switches.waits_for_decisions(connection):
            return "the books wait for decisions that they have lost"
        return None


@dataclass(slots=True)
class Finding:
    """What one question found."""

    invariant: Invariant
    broken: dict[int, str] = field(default_factory=dict)  # reference by row id
    mended: set[int] = field(default_factory=set)
    next_id: int = 0
    not_judged: str | None = None


def report(store: Store, leeway: Leeway, now: datetime) -> list[Finding]:
    """Ask every question about the whole book. Writes nothing."""
    findings = [Finding(invariant) for invariant in INVARIANTS]
    for finding in findings:
        with store.reading() as connection:
            finding.not_judged = leeway.why_not_judged(connection, finding.invariant, now)
            if finding.not_judged is None:
                for ids in _slices(connection, finding.invariant):
                    finding.broken |= _found(connection, finding.invariant, leeway, now, ids)
    return findings


def _slices(connection: Connection, invariant: Invariant) -> Iterator[range]:
    by = invariant.question.by
    if by is None:
        yield range(1)
        return
    for first in range(0, last_id(connection, by) + 1, SLICE):
        yield range(first, first + SLICE)


def inspect(ports: Ports, intervals: Mapping[str, int]) -> int:
    """Ask the questions that are due, and alert about what is newly broken. Returns how many rows.

    A question that fails stops no other one; its error is raised at the end.
    """
    now, leeway = ports.clock.now(), Leeway(ports.timings, intervals)
    with ports.store.reading() as connection:
        runs, known = breaches.runs(connection), breaches.known(connection)
    findings: list[Finding] = []
    failed: DBAPIError | None = None
    for invariant in INVARIANTS:
        run = runs.get(invariant.name)
        if run is not None and run.ran_at <= now < run.ran_at + invariant.every:
            continue
        try:
            with ports.store.reading() as connection:
                suspects = known.get(invariant.name, ())
                findings.append(_asked(connection, invariant, leeway, now, run, suspects))
        except DBAPIError as error:
            log.error("invariant.not_asked", invariant=invariant.name, reason=type(error).__name__)  # noqa: TRY400 - raised at the end
            failed = error
    with ports.store.transaction() as connection:
        told = {one.invariant: _record(connection, one, now) for one in findings}
    for invariant, references in told.items():
        if references:
            log.error("billing.alert", kind=str(EventKind.INVARIANT_BROKEN),
                      **_words(invariant, references))  # fmt: skip
    if failed is not None:
        raise failed
    return sum(len(references) for references in told.values())


def _asked(
    connection: Connection,
    invariant: Invariant,
    leeway: Leeway,
    now: datetime,
    run: Run | None,
    suspects: Sequence[int],
) -> Finding:
    finding = Finding(invariant, not_judged=leeway.why_not_judged(connection, invariant, now))
    if finding.not_judged is not None:
        return finding
    by, first = invariant.question.by, run.next_id if run else 0
    finding.broken = _found(connection, invariant, leeway, now, range(first, first + SLICE))
    still = set(finding.broken)
    if by is not None:
        more = first + SLICE <= last_id(connection, by)
        finding.next_id = first + SLICE if more else 0
        for one in suspects:
            still |= _found(connection, invariant, leeway, now, range(one, one + 1)).keys()
    finding.mended = set(suspects) - still
    return finding


def _found(
    connection: Connection, invariant: Invariant, leeway: Leeway, now: datetime, ids: range
) -> dict[int, str]:
    before = now - leeway.of(invariant)
    rows = ask(connection, invariant.question, now, before, ids)
    return {row.id: row.reference for row in rows}


def _record(connection: Connection, finding: Finding, now: datetime) -> list[str]:
    """Write what was found. Returns the references that are told of now."""
    name = finding.invariant.name
    breaches.record_run(connection, name, Run(now, finding.next_id))
    breaches.remove(connection, name, finding.mended)
    added = breaches.add(connection, name, finding.broken, now)
    if added:
        said = Event(
            EventKind.INVARIANT_BROKEN, now, BY, _words(finding.invariant, added), alert=True
        )
        history.write(connection, [Entry(said)])
    return added


def _words(invariant: Invariant, references: Sequence[str]) -> dict[str, object]:
    return {
        "invariant": invariant.name,
        "says": invariant.says,
        "count": len(references),
        "broken_by": list(references[:NAMED]),
        "look": invariant.look.format(reference=references[0]),
    }
