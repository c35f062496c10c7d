"""Every fault at every crossing, and every pair of them, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from tests.faults.bench import Bench
from tests.faults.boundaries import Crossing, Fault, Outcome, Scenario

KNOWN: tuple[tuple[str, ...], ...] = ()
"""Words of violations that wait to be mended. Each has its test in test_regressions.py."""


@dataclass(slots=True)
class Tally:
    """What a sweep over faults has shown."""

    boundaries: int = 0  # crossings of the run without a fault
    singles: int = 0  # faults struck once
    pairs: int = 0  # ordered pairs
    runs: int = 0  # distinct worlds that were run to their end
    charged_twice: int = 0
    lost: int = 0
    bad: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.runs += 1
        said = str(outcome)
        if outcome.violations and any(all(word in said for word in words) for words in KNOWN):
            self.known.append(said)
            return
        self.charged_twice += outcome.charged_twice
        self.lost += outcome.lost
        if outcome.violations:
            self.bad.append(said)

    def __iadd__(self, other: Tally) -> Self:
        for name in ("boundaries", "singles", "pairs", "runs", "charged_twice", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad += other.bad
        self.known += other.known
        return self

    def __str__(self) -> str:
        return (
            f"{self.boundaries} boundaries, {self.singles:,} singles, {self.pairs:,} pairs, "
            f"{self.runs:,} runs; charged twice: {self.charged_twice}, lost: {self.lost}"
            + (f"; {len(self.known)} known violations" if self.known else "")
        )


def strikes(
    crossings: Sequence[Crossing], fault: Fault, *, all_of_them: bool
) -> Iterator[tuple[int, int]]:
    """(number, how many crossings it stands for) of every place where the fault can strike.

    A death leaves nothing but the world outside. Crossings between which nothing outside happened
    leave the same one, so unless `all_of_them` the first stands for the rest.
    """
    fitting = [crossing for crossing in crossings if fault.applies_to(crossing)]
    if all_of_them or not fault.depends_on_the_world_alone:
        yield from ((crossing.number, 1) for crossing in fitting)
        return
    alike = Counter(crossing.world for crossing in fitting)
    first = {crossing.world: crossing.number for crossing in reversed(fitting)}
    yield from ((first[world], alike[world]) for world in alike)


def singles(
    bench: Bench, scenario: Scenario, faults: Sequence[Fault], *, all_of_them: bool = False
) -> Tally:
    tally = Tally()
    calm = bench.run(scenario)
    tally.add(calm)
    tally.boundaries = len(calm.crossings)
    for fault in faults:
        for number, stands_for in strikes(calm.crossings, fault, all_of_them=all_of_them):
            tally.singles += stands_for
            tally.add(bench.run(scenario, [(number, fault)]))
    return tally


def pairs(
    bench: Bench,
    scenario: Scenario,
    firsts: Sequence[Fault],
    seconds: Sequence[Fault],
    *,
    all_of_them: bool = False,
) -> Tally:
    """Every ordered pair: the second fault is counted from the first, or from the restart."""
    tally = Tally()
    calm = bench.run(scenario)
    tally.boundaries = len(calm.crossings)
    for first in firsts:
        for number, stands_for in strikes(calm.crossings, first, all_of_them=all_of_them):
            once = bench.run(scenario, [(number, first)])
            for second in seconds:
                for then, also in strikes(once.crossings, second, all_of_them=all_of_them):
                    tally.pairs += stands_for * also
                    tally.add(bench.run(scenario, [(number, first), (then, second)]))
    return tally
