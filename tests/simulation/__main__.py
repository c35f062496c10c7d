"""A long campaign on all cores: python -m tests.simulation --seeds 100000 [--first 0].

Prints how often each rare state was reached, and the second debits that no client could know of,
with the reason. Fails for a violation, and, where there are enough seeds, for a state that nobody
came to: it has not been tested.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections import Counter
from functools import partial

from tests.simulation.lives import LIVES, Lived, live, migrated_template, must_reach
from tests.simulation.simulator import silence_logs

ENOUGH_SEEDS = 2_000

_TEMPLATE = b""


def _prepare(template: bytes) -> None:
    global _TEMPLATE  # noqa: PLW0603 - one copy per process of the pool
    _TEMPLATE = template
    silence_logs()
    gc.freeze()  # what is loaded by now stays: a run makes few circles and much that dies young
    gc.set_threshold(50_000, 20, 100)


def _run(life: str | None, seed: int) -> Lived:
    return live(seed, _TEMPLATE, life)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--life", choices=LIVES, help="only this kind; default: all in turn")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    options = parser.parse_args()
    started = time.monotonic()
    violations, states, excused = 0, Counter[str](), Counter[str]()
    seeds = range(options.first, options.first + options.seeds)
    run = partial(_run, options.life)
    with multiprocessing.Pool(options.processes, _prepare, (migrated_template(),)) as pool:
        for done, lived in enumerate(pool.imap_unordered(run, seeds, chunksize=20), start=1):
            states += lived.reached
            excused += lived.excused
            if lived.violation:
                violations += 1
                print(lived.violation, flush=True)
            if done % 1000 == 0:
                took = f"{time.monotonic() - started:.0f} s"
                print(f"{done} seeds, {violations} violations, {took}", flush=True)
    never = sorted(name for name in must_reach(options.life) if not states[name])
    _print_counts("states reached", states | Counter(dict.fromkeys(never, 0)))
    _print_counts("charged twice, and no client could know", excused)
    print(f"{options.seeds} seeds from {options.first}: {violations} violations")
    if never and options.seeds >= ENOUGH_SEEDS:
        print(f"never reached, so not tested: {', '.join(never)}")
        return 1
    return 1 if violations else 0


def _print_counts(title: str, counts: Counter[str]) -> None:
    print(f"{title}: {sum(counts.values())}")
    for name, count in sorted(counts.items()):
        print(f"{count:9,}  {name}")


if __name__ == "__main__":
    sys.exit(main())
