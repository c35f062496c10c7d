"""`python -m tests.faults [--long]`: every fault at every boundary, counted."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.faults.bench import sqlite_bench
from tests.faults.scenarios import (
    BREAKS,
    DIES,
    DIES_WITH_THE_BROKER,
    DUPLICATE_CREATES,
    EVERYTHING,
    EXPIRIES,
    LIES,
    MAIN,
    NAPS,
)
from tests.faults.tally import Tally, pairs, singles


def main(*, long: bool) -> int:
    began = time.monotonic()
    total = Tally()
    others = [DIES_WITH_THE_BROKER, BREAKS, LIES, *NAPS] if long else []
    chosen = EVERYTHING if long else DUPLICATE_CREATES
    twice = [scenario for scenario in EVERYTHING if scenario not in EXPIRIES] if long else [MAIN]
    with tempfile.TemporaryDirectory(dir=_memory()) as folder, \
            sqlite_bench(Path(folder, "billing.db")) as bench:  # fmt: skip
        for scenario in chosen:
            total += _shown(scenario.name, singles(bench, scenario, [DIES, *others]))
        for scenario in twice:
            total += _shown(f"{scenario.name}, twice", pairs(bench, scenario, [DIES], [DIES]))
    print(f"TOTAL: {total}; {time.monotonic() - began:.0f} s")
    bad = total.bad
    print("\n".join(bad))
    return 1 if bad else 0


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108


def _shown(name: str, tally: Tally) -> Tally:
    print(f"{name}: {tally}", flush=True)
    return tally


if __name__ == "__main__":
    sys.exit(main(long="--long" in sys.argv))
