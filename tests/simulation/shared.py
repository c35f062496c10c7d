"""Two books of different merchants on one gateway account, with equal references and prices.

Both are older than prefixes of references. Sometimes even their customers have the same names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from billing_worker.services.ports import Ports
from tests.simulation.memory import MemoryStore
from tests.simulation.people import People
from tests.simulation.rare import ANOTHER_BOOKS, FOUND_PAID, reached
from tests.simulation.simulator import Simulation
from tests.support.books import name_book
from tests.support.world import World


@dataclass(slots=True)
class Side:
    """One of the two merchants, and who acts there."""

    store: MemoryStore
    world: World
    ports: Ports
    people: People
    tokens: dict[str, str] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)


class Shared(Simulation):
    """At each step one of the two acts; the tasks of both go on as they like."""

    must_reach = Simulation.must_reach | {ANOTHER_BOOKS, FOUND_PAID}

    def __post_init__(self) -> None:
        super().__post_init__()
        first = Side(self.store, self.world, self.ports, self.people)
        store = self._new_store(1)
        self.calm = True
        name_book(store, identity="thebookofanother")
        self.calm = False
        world = self._within(World(store, beside=first.world))
        references = [f"sub-{n}" for n in range(self.subscriptions)]
        people = People(self.rng, references, self.rarely)
        self.sides = (first, Side(store, world, world.ports, people))
        self.names = self.rng.choice([("", ""), ("alice-", "bob-")])

    def _act_as(self, side: Side) -> None:
        self.store, self.world, self.ports = side.store, side.world, side.ports
        self.people, self.tokens, self.excused = side.people, side.tokens, side.excused

    def _subscribe(self) -> None:
        for side, names in zip(self.sides, self.names, strict=True):
            self.customers = names
            self._act_as(side)
            super()._subscribe()

    def _step(self) -> None:
        self._act_as(self.rng.choice(self.sides))
        super()._step()

    def _come_to_rest(self) -> None:
        for side in self.sides:
            self._act_as(side)
            self.calm = True
            super()._come_to_rest()

    def reached(self) -> Counter[str]:
        return sum((reached(side.store) for side in self.sides), self.happened)

    def _check_sales(self) -> None:
        """By the gateway's id: each reference may be sold by both."""
        sold = Counter(ask.gateway_id for ask in self.witness.asks)
        for gateway_id, count in sold.items():
            if count > 1:
                self._violated(f"{gateway_id} sold {count} times")
