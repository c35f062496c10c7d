"""A life that is forgotten: the books go back to a backup, the gateway does not.

What was decided since the backup is said again while the books wait, each with the time at which
it was made. `python -m tests.simulation --life restored` runs these alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import select

from billing_worker.persistence.schema import tables
from billing_worker.services.kill_switch import switch
from tests.simulation.people import Decision
from tests.simulation.rare import FOUND_PAID, SOLD_BY_A_FORGOTTEN_LIFE
from tests.simulation.simulator import Simulation

_OVER = {"cancelled", "paused"}


@dataclass(frozen=True, slots=True)
class Prevented:
    owed: frozenset[str]  # the periods that were owed all the same
    until: datetime | None  # a pause ends by itself


class Restored(Simulation):
    """A backup at some step; at a later one it is restored, and sales are started as restored."""

    must_reach = Simulation.must_reach | {
        FOUND_PAID,
        SOLD_BY_A_FORGOTTEN_LIFE,
        "books restored from a backup",
        "decision said again after a restore",
        "customer pays on a page left open",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.answers_are_heard = True
        self.taken_at = self.rng.randrange(1, 20)
        self.restored_at = self.taken_at + self.rng.randrange(15, 80)
        self.step = 0
        self.kept = b""
        self.said: list[tuple[datetime, Decision]] = []
        self.prevented: dict[str, Prevented] = {}
        """Of subscriptions that were over, or paused, in the life that is forgotten."""
        self.asked_before = 0

    def _step(self) -> None:
        self.step += 1
        if self.step == self.taken_at:
            self.kept = self.store.copy()
            self._say("backup")
        if self.step == self.restored_at:
            self._restore()
        super()._step()

    def _decided(self, at: datetime, decision: Decision) -> None:
        self.prevented.pop(decision.reference, None)
        if self.taken_at <= self.step < self.restored_at:
            self.said.append((at, decision))

    # --- what is forgotten -------------------------------------------------------------------

    def _restore(self) -> None:
        self.calm = True
        self._drop_tasks()
        for _ in range(self.rng.randrange(4)):
            self.world.tick()
            self.world.clock.advance(self.rng.choice([1, 60, 4000, 90_000]))
        self._say("restored")
        self.happened["books restored from a backup"] += 1
        self.prevented = self._what_is_prevented()
        self.asked_before = len(self.witness.asks)
        self.world.bell.messages.clear()
        self._before_memory_is_lost()
        self.store.replace(self.kept)
        self._switch_sales(on=False)
        for _ in range(self.rng.randrange(3)):
            self.world.tick()
            self.world.clock.advance(self.rng.choice([1, 60, 4000]))
        self._say_everything_again()
        self._switch_sales(on=True)
        self.calm = False

    def _switch_sales(self, *, on: bool) -> None:
        now = self.world.clock.now()
        switch(self.store, on=on, service=None, by="ann", reason="backup", now=now, restored=True)

    def _say_everything_again(self) -> None:
        for at, decision in self.said:
            self._say(f"again about {decision.reference}, as of {at - self.start}")
            self.happened["decision said again after a restore"] += 1
            decision.say(self.ports, at)

    def _what_is_prevented(self) -> dict[str, Prevented]:
        stored = tables.subscriptions
        query = (
            select(
                stored.c.reference_id,
                stored.c.resumes_at,
                tables.invoices.c.reference_id,
                tables.invoices.c.status,
            )
            .outerjoin(tables.invoices, tables.invoices.c.subscription_id == stored.c.id)
            .where(stored.c.status.in_(_OVER))
        )
        found: dict[str, Prevented] = {}
        with self.store.reading() as connection:
            for reference, until, invoice, status in connection.execute(query):
                known = found.setdefault(reference, Prevented(frozenset(), until))
                if invoice is not None and status != "void":
                    found[reference] = replace(known, owed=known.owed | {invoice})
        return found

    # --- what must hold ----------------------------------------------------------------------

    def _check_money(self) -> None:
        super()._check_money()
        for ask in self.witness.asks[self.asked_before :]:
            was = self.prevented.get(ask.period.rpartition("-p")[0])
            if was is None or ask.period in was.owed:
                continue
            if was.until is None or ask.at < was.until:
                self._violated(f"{ask.period} was sold, which a forgotten decision had prevented")
