"""A database that forgets its last commits while worker and gateway go on.

As a fail-over to a standby that was behind, or an older copy put in the place of a file: nobody is
told, and whoever is in the middle of a charge goes on with what it knows. What is kept outside of
the database, the record of the newest sale, is not forgotten.
"""

from __future__ import annotations

from datetime import datetime

from tests.simulation.people import Decision
from tests.simulation.rare import SOLD_BY_A_FORGOTTEN_LIFE
from tests.simulation.simulator import Simulation

MOST = 12
"""So many commits are forgotten at once at the most."""


class Forgetful(Simulation):
    """Commits are lost at any step, again and again."""

    must_reach = Simulation.must_reach | {
        SOLD_BY_A_FORGOTTEN_LIFE,
        "commits lost",
        "decision said again after a loss",
        "customer pays on a page left open",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.answers_are_heard = True
        self.said: list[tuple[int, datetime, Decision]] = []

    def _subscribe(self) -> None:
        super()._subscribe()
        self.store.remember(MOST)

    def _step(self) -> None:
        asks = len(self.witness.asks)
        super()._step()
        just_sold = len(self.witness.asks) > asks
        if self.rng.random() < (0.25 if just_sold else 0.02):
            self._forget()

    def _decided(self, at: datetime, decision: Decision) -> None:
        self.said.append((self.store.commits, at, decision))

    def _forget(self) -> None:
        self._before_memory_is_lost()
        lost = self.store.forget(self.rng.randint(1, MOST))
        self._say(f"{lost} commits are lost")
        self.happened["commits lost"] += lost
        self._say_again()

    def _say_again(self) -> None:
        """People hear of the loss: what they had decided is said again, as of then."""
        lost = [(at, one) for number, at, one in self.said if number > self.store.commits]
        self.said = [one for one in self.said if one[0] <= self.store.commits]
        self.calm = True
        for at, decision in lost:
            self._say(f"again about {decision.reference}, as of {at - self.start}")
            self.happened["decision said again after a loss"] += 1
            decision.say(self.ports, at)
            self._decided(at, decision)
        self.calm = False

    def _problems(self) -> list[str]:
        return self._stuck() + self._untold() + self._broken()
