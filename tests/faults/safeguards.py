"""Every safeguard by name, taken out one at a time: does a fault then show that it is missing?

`python -m tests.faults.safeguards` prints the table. A safeguard is disabled in the source of the
function that has it, so a change of that line shows here: first as an error, then as a decision.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.faults.bench import Bench, sqlite_bench
from tests.faults.safeguards_of_a_charge import OF_A_CHARGE
from tests.faults.safeguards_of_books import OF_BOOKS
from tests.faults.trials import Safeguard, caught, invariants

SAFEGUARDS: Sequence[Safeguard] = (*OF_A_CHARGE, *OF_BOOKS)


def table(bench: Bench) -> int:
    """Print what became of every mutant; return how many were not caught and should have been."""
    missed = 0
    for safeguard in SAFEGUARDS:
        outcome = caught(bench, safeguard)
        if outcome is not None:
            verdict = "caught by " + ", ".join(invariants(outcome))
        elif safeguard.covered_by:
            verdict = f"double defence: covered by {safeguard.covered_by}"
        else:
            verdict, missed = "SURVIVED", missed + 1
        print(f"{safeguard.name:<58} {verdict}", flush=True)
    print(f"{len(SAFEGUARDS)} mutants, {missed} not caught, {bench.runs} runs")
    return missed


if __name__ == "__main__":
    with ExitStack() as _stack:
        _folder = _stack.enter_context(tempfile.TemporaryDirectory())
        sys.exit(table(_stack.enter_context(sqlite_bench(Path(_folder, "billing.db")))) > 0)
