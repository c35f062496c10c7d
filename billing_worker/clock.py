"""The port through which all code reads the time. Tests and simulations pass their own clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """Return the time, aware and in UTC, for everything that is stored."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never jump, for deadlines inside one process."""
        ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)  # noqa: TID251 - the only place that reads the system's clock.

    def monotonic(self) -> float:
        return time.monotonic()


def _since_boot() -> float:
    """Return monotonic seconds. They continue during a suspend if the system supports it."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class ClockWatch:
    """Measures how far the clock of this process is off.

    It compares with the database server's clock. Without a server, it compares with the time that
    has passed since the process started.
    """

    def __init__(self, clock: Clock, steady: Callable[[], float] = _since_boot) -> None:
        self._clock = clock
        self._steady = steady
        self._started = clock.now() - timedelta(seconds=steady())

    def ahead_by(self, database_now: datetime | None) -> timedelta:
        """Return by how much the process's clock is ahead; negative: it is behind."""
        if database_now is None:
            database_now = self._started + timedelta(seconds=self._steady())
        return self._clock.now() - database_now
