"""Stories of several charges, or of people beside them. Each tells what must not have come of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from billing_worker.clock import ClockWatch
from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.store import Store
from billing_worker.services import kill_switch
from billing_worker.services.attempts import commit
from billing_worker.services.ports import Ports
from billing_worker.services.subscriptions import lifecycle
from tests.faults.disabling import exchanged
from tests.support import recovery
from tests.support.backup import Backup, backup, restore
from tests.support.world import VirtualClock, World

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def charged(world: World, *expected: str) -> Iterator[str]:
    """Each of these periods once, no other, and the books know it."""
    debits = dict(world.debits())
    if debits != dict.fromkeys(expected, 1):
        yield f"debits: {debits}, expected one each of {', '.join(expected) or 'none'}"
    yield from (f"books: {found}" for found in world.discrepancies())


# --- decisions that are forgotten -----------------------------------------------------------------


def forgets_a_cancellation(world: World, *, waits: bool) -> Iterator[str]:
    """One at the end of the period, which is said again after that end."""
    world.subscribe("approved", interval="week")
    world.tick()
    kept = backup(world.store)
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    _decide(world, "cancel", at_period_end=True)
    world.run_for(9 * DAY, step=DAY)
    _restore(world, kept, waits=waits)
    _decide(world, "cancel", at_period_end=True, decided_at=decided_at)
    _turn_sales(world, on=True)
    world.run_for(10 * DAY, step=DAY)
    yield from charged(world, "sub-1-p0")


def forgets_that_a_cancellation_was_withdrawn(world: World) -> Iterator[str]:
    """It stands in the backup, and its date has passed when that is restored."""
    world.subscribe("approved")
    world.tick()
    _decide(world, "cancel", at_period_end=True)
    kept = backup(world.store)
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    _decide(world, "uncancel")
    world.run_for(30 * DAY, step=DAY)
    _restore(world, kept, waits=True)
    try:
        _decide(world, "uncancel", decided_at=decided_at)
    except InvalidInput as error:
        yield f"refused: {error}"
    _turn_sales(world, on=True)
    world.run_for(DAY, step=HOUR)
    yield from charged(world, "sub-1-p0", "sub-1-p1")


def _decide(world: World, what: str, **options: Any) -> None:
    getattr(lifecycle, what)(world.store, world.clock, "sub-1", by="ann", **options)


def _restore(world: World, kept: Backup, *, waits: bool) -> None:
    restore(world.store, kept)
    world.bell.messages.clear()
    _turn_sales(world, on=False, restored=waits)
    world.run_for(2 * HOUR, step=HOUR)


def _turn_sales(world: World, *, on: bool, restored: bool = True) -> None:
    kill_switch.switch(
        world.store, on=on, service=None, by="ann", reason="backup", now=world.clock.now(),
        restored=restored,
    )  # fmt: skip


# --- answers that come late -----------------------------------------------------------------------


def replaces_the_card_of_a_decline_that_flips(world: World) -> Iterator[str]:
    """The gateway declines, the customer gives another card at once, and the first sale is paid."""
    world.subscribe("flips_after_5m", ends_after_periods=1)
    world.tick()
    recovery.replace(world, "approved")
    world.run_for(HOUR)
    yield from charged(world, "sub-1-p0")


# --- the clock --------------------------------------------------------------------------------------


class _SetClock(VirtualClock):
    """A machine's clock that somebody sets. The monotonic one is left alone, as it then is."""

    off = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.off


def sets_the_clock_days_ahead(world: World) -> Iterator[str]:
    """For one sweep."""
    clock = world.clock = _SetClock()
    world.sandbox._now = lambda: clock.now() - clock.off
    world.ports = world.ports_of_a_worker(timekeeper=ClockWatch(clock, clock.monotonic))
    world.subscribe("approved", interval="week")
    world.tick()
    clock.off = 10 * DAY
    world.tick()
    clock.off = timedelta(0)
    yield from charged(world, "sub-1-p0")


# --- a server with defaults of its own ------------------------------------------------------------


def stops_sales_while_a_charge_is_submitted(world: World) -> Iterator[str]:
    """Its transaction has begun, on a server whose transactions see one snapshot to their end."""

    def stopped_first(ports: Ports, *submission: Any) -> Any:
        _turn_sales(world, on=False, restored=False)
        return submit_all(ports, *submission)

    submit_all = commit.submit_all
    with _one_snapshot(world.store), exchanged(commit, "submit_all", stopped_first):
        world.subscribe("approved", ends_after_periods=1)
        world.tick()
    yield from charged(world)


@contextmanager
def _one_snapshot(store: Store) -> Iterator[None]:
    _set_isolation(store, "TO 'repeatable read'")
    try:
        yield
    finally:
        _set_isolation(store, "TO DEFAULT")


def _set_isolation(store: Store, value: str) -> None:
    name = store.engine.url.database
    with store.engine.begin() as connection:
        setting = "default_transaction_isolation"
        connection.execute(text(f'ALTER DATABASE "{name}" SET {setting} {value}'))
    store.engine.dispose()  # it counts for new connections
