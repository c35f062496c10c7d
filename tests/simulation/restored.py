"""A life that is forgotten: the books go back to a backup, the gateway does not.

`python -m tests.simulation --life restored` runs these alone.
"""

from __future__ import annotations

from billing_worker.persistence.switches import mark_restored, turn_sales
from tests.simulation.people import Act, People
from tests.simulation.simulator import Simulation


class Steady(People):
    """They change no dates: what is said between backup and restore would have to be said again."""

    def next_act(self) -> tuple[str, Act]:
        reference = self._rng.choice(self._references)
        name, act = self._rng.choice(
            [
                ("retries", self._retry),
                ("replaces the card of", self._replace_card),
                ("asks for a page for", self._ask_for_page),
                ("gives up what is overdue, not only", self._give_up),
            ]
        )
        return f"somebody {name} {reference}", act(reference)


class Restored(Simulation):
    """A backup at some step; at a later one it is restored, and sales are started as restored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.people = Steady(self.rng, [f"sub-{n}" for n in range(self.subscriptions)])
        self.taken_at = self.rng.randrange(1, 20)
        self.restored_at = self.taken_at + self.rng.randrange(15, 80)
        self.step = 0
        self.kept = b""

    def _step(self) -> None:
        self.step += 1
        if self.step == self.taken_at:
            self.kept = self.store.copy()
            self._say("backup")
        if self.step == self.restored_at:
            self._restore()
        super()._step()

    def _restore(self) -> None:
        self.calm = True
        self._drop_tasks()
        for _ in range(self.rng.randrange(4)):
            self.world.tick()
            self.world.clock.advance(self.rng.choice([1, 60, 4000, 90_000]))
        self._say("restored")
        self.world.bell.messages.clear()
        self.people.pages.clear()
        self.store.replace(self.kept)
        now = self.world.clock.now()
        with self.store.transaction() as connection:
            mark_restored(connection, by="ann", reason="backup", now=now)
            turn_sales(connection, on=True, by="ann", reason="backup", now=now)
        self.calm = False

    def _problems(self) -> list[str]:
        """Nobody compares the lists here: what was voided meanwhile is not looked for."""
        return self._stuck() + self._untold()
