"""The port through which everybody learns the time. Tests and simulations pass their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """Aware, in UTC: for anything that is written down."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump: for deadlines inside one process."""
        ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)  # noqa: TID251 - the one place that may ask the system.

    def monotonic(self) -> float:
        return time.monotonic()


def _since_boot() -> float:
    """Goes on while the machine is suspended, where the system can tell."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class ClockWatch:
    """How far this process's clock is off: from the database server's, or, where there is none, from
    the time that has passed since this process was started.
    """

    def __init__(self, clock: Clock, steady: Callable[[], float] = _since_boot) -> None:
        self._clock = clock
        self._steady = steady
        self._started = clock.now() - timedelta(seconds=steady())

    def ahead_by(self, database_now: datetime | None) -> timedelta:
        """Negative: it is behind."""
        if database_now is None:
            database_now = self._started + timedelta(seconds=self._steady())
        return self._clock.now() - database_now
