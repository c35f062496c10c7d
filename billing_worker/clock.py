"""The port through which everybody learns the time. Tests and simulations pass their own."""

from __future__ import annotations

import time
from datetime import UTC, datetime
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
