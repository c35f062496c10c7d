"""A real worker whose clock somebody else sets: it is off by the seconds in the file STORM_CLOCK.

The product does not know: this launcher replaces the clock in this process alone, and then runs
Celery's own main with the arguments it was given. The monotonic clock is left alone, as it is by
whoever sets a machine's clock.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

from celery.__main__ import main

from billing_worker import clock

STEP = Path(os.environ["STORM_CLOCK"])


class SteppingClock(clock.SystemClock):
    def now(self) -> datetime:
        return super().now() + timedelta(seconds=float(STEP.read_text()))


if __name__ == "__main__":
    # Before the modules that import it by name are loaded.
    clock.SystemClock = SteppingClock  # type: ignore[misc]
    if os.environ.get("STORM_CLOCK_IS_BELIEVED"):  # it shows what happens later, at once
        clock.ClockWatch.ahead_by = lambda *_: timedelta(0)  # type: ignore[method-assign]
    main()
