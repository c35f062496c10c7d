"""What a safeguard is tried with: a scenario and its faults, or a story of several charges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from billing_worker.sandbox.gateway import Behaviour
from tests.faults.bench import Bench, listening
from tests.faults.boundaries import Fault, Outcome, Scenario
from tests.faults.disabling import Disable
from tests.support.world import World


@dataclass(frozen=True, slots=True)
class Trial:
    """A scenario, and faults: each at the first crossing (after the last fault) of that name."""

    scenario: Scenario
    faults: tuple[tuple[Fault, str], ...] = ()
    on_the_wire: bool = False
    """Over the real HTTP client and a real socket."""

    def run(self, bench: Bench) -> Outcome:
        plan: list[tuple[int, Fault]] = []
        run = bench.run_on_the_wire if self.on_the_wire else bench.run
        outcome = run(self.scenario)
        for fault, where in self.faults:
            number = next((c.number for c in outcome.crossings if where in c.name), None)
            if number is None:
                raise LookupError(f"{self.scenario.name} never comes to {where}")
            plan.append((number, fault))
            outcome = run(self.scenario, plan)
        return outcome


@dataclass(frozen=True, slots=True)
class Story:
    """What takes more than one charge: played in a world of its own, it tells what went wrong."""

    name: str
    play: Callable[[World], Iterator[str]]
    behaviour: Behaviour = field(default_factory=Behaviour)

    def run(self, bench: Bench) -> Told:
        bench.runs += 1
        with listening() as heard:
            told = Told(self.name)
            told.violations += self.play(bench.world(self.behaviour))
            told.violations += heard
        return told


@dataclass(slots=True)
class Told:
    """What a story has shown, as an outcome tells it."""

    name: str
    violations: list[str] = field(default_factory=list)
    charged_twice: bool = False
    lost: bool = False

    def __str__(self) -> str:
        return "\n    ".join([self.name, *self.violations])


@dataclass(frozen=True, slots=True)
class Safeguard:
    name: str
    disable: Disable
    trials: tuple[Trial | Story, ...]
    covered_by: str = ""
    """What else stops the harm: this one alone is not missed."""


def caught(bench: Bench, safeguard: Safeguard) -> Outcome | Told | None:
    """The first trial that shows that the safeguard is missing."""
    bench.forget()
    try:
        with safeguard.disable(bench):
            for trial in safeguard.trials:
                outcome = trial.run(bench)
                if outcome.violations:
                    return outcome
    finally:
        bench.forget()
    return None


def invariants(outcome: Outcome | Told) -> list[str]:
    """Which invariants caught it, by name."""
    found = [violation.partition(":")[0] for violation in outcome.violations]
    found += ["CHARGED TWICE"] if outcome.charged_twice else []
    found += ["LOST"] if outcome.lost else []
    return list(dict.fromkeys(found))


def trials(safeguards: Sequence[Safeguard]) -> list[Trial | Story]:
    """All of them, each once."""
    found: list[Trial | Story] = []
    for safeguard in safeguards:
        found += [trial for trial in safeguard.trials if trial not in found]
    return found
