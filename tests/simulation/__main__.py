"""A long campaign on all cores: python -m tests.simulation --seeds 100000 [--first 0]."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
import zoneinfo
from pathlib import Path

from billing_worker.persistence.migrate import migrate
from billing_worker.persistence.store import Store
from tests.simulation.simulator import Simulation, Violation, silence_logs, template_bytes

_TEMPLATE = b""


def _prepare(template: bytes) -> None:
    global _TEMPLATE  # noqa: PLW0603 - one copy per process of the pool
    _TEMPLATE = template
    silence_logs()


def _run(seed: int) -> str | None:
    try:
        Simulation(seed, _TEMPLATE).run()
    except Violation as violation:
        return str(violation)
    except Exception as error:
        return f"seed {seed}: {type(error).__name__}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    zoneinfo.reset_tzpath(())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "template.db"
        with Store(f"sqlite:///{path}") as store:
            migrate(store)
        template = template_bytes(path)
    started = time.monotonic()
    violations = []
    seeds = range(options.first, options.first + options.seeds)
    with multiprocessing.Pool(initializer=_prepare, initargs=(template,)) as pool:
        for done, violation in enumerate(pool.imap_unordered(_run, seeds, chunksize=20), start=1):
            if violation:
                violations.append(violation)
                print(violation, flush=True)
            if done % 1000 == 0:
                print(f"{done} seeds, {len(violations)} violations, "
                      f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    print(f"{options.seeds} seeds from {options.first}: {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
