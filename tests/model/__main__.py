"""python -m tests.model: the protocol in its widest bounds, and what each safeguard is worth."""

import time

from tests.model.protocol import MUTANTS, Bounds, search

for bounds in (
    Bounds(periods=1, attempts=3),
    Bounds(claims=1, crashes=1),
    Bounds(attempts=1, claims=2),
):
    started = time.monotonic()
    result = search(bounds=bounds)
    print(f"{bounds}: {result.states:,} states, {result.transitions:,} transitions, "
          f"violation: {result.violation}, stuck: {result.stuck}, "
          f"{time.monotonic() - started:.1f} s", flush=True)  # fmt: skip
for names, rules in MUTANTS.items():
    result = search(rules, Bounds(periods=1))
    print(f"without {' and '.join(names)}: {result.violation} in {len(result.trace)} steps")
    print("    " + " > ".join(result.trace))
