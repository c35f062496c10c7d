"""The kill switch: no sale at all, or none through one service of the gateway."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import history, switches
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.guards import lost_memory
from billing_worker.services.ports import Outside


def switch(
    store: Store,
    *,
    on: bool,
    service: str | None,
    by: str,
    reason: str,
    now: datetime,
    restored: bool = False,
    moved: bool = False,
    outside: Sequence[Outside] = (),
) -> None:
    """Turn sales, or one service (payment_card_usd_hpp), off or on. `by`: "operator:ann".

    Off holds once this returns: no transaction that has read "on" may commit any more. What was
    submitted before is sent within the sale's gate (`Timings.sale_gate_seconds`, and the connection).
    An error after the first commit leaves the switch turned: then only the waiting, or the
    ringing, is missing. On rings for what was put off. Raises InvalidInput on `service` when the one
    to be turned on is not paused.

    `restored`: the books are from a backup. Off, the book waits until the decisions that it has
    forgotten are said again: nothing becomes due. On, that has been done, and from now on nothing
    that was due by now is created at the gateway before it was looked for there, under the
    reference that a forgotten charge had. A book that waits is not turned on without `restored`:
    raises InvalidInput on that name.

    `moved`: this database is a copy, and the original is gone; implies `restored`. Without it sales
    are not started on a copy: InvalidInput on `sales` says what it was copied from.
    """
    restored = restored or moved
    with store.transaction() as connection:
        if on and service is None:
            lost_memory.start_here(connection, outside, moved=moved, now=now)
        if restored:
            _mark(connection, on=on, by=by, reason=reason, now=now)
        elif on and service is None and switches.waits_for_decisions(connection):
            raise InvalidInput("restored", switches.WAITS)
        if service is None:
            switches.turn_sales(connection, on=on, by=by, reason=reason, now=now)
        elif on:
            _resume(connection, service)
        else:
            switches.pause_service(connection, service, by=by, reason=reason, now=now)
        data = {"on": on, "reason": reason, "service": service, "restored": restored}
        if moved:
            data["moved"] = True
        history.write(connection, [Entry(Event(EventKind.SALES_SWITCHED, now, by, data))])
        switched = switches.read(connection)
    if restored:
        lost_memory.begin_record(outside, switched, now)
    with store.transaction() as connection:
        if on:
            switches.ring_again(connection, service, now)
        else:
            switches.wait_for_readers(connection)


def _resume(connection: Connection, service: str) -> None:
    if not switches.resume_service(connection, service):
        paused = ", ".join(sorted(switches.read(connection).paused)) or "none"
        raise InvalidInput("service", f"{service} is not paused; paused: {paused}")


def _mark(connection: Connection, *, on: bool, by: str, reason: str, now: datetime) -> None:
    if on:
        switches.mark_restored(connection, by=by, reason=reason, now=now)
        switches.await_no_more(connection)
    else:
        switches.await_decisions(connection, by=by, reason=reason, now=now)
