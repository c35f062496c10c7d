"""A receiver that knows of a simulated book only what it was told, and whether it is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import select

from billing_worker.persistence.outbox import feed
from billing_worker.persistence.schema import tables
from billing_worker.services.outbox.publish import publish
from tests.simulation.memory import MemoryStore


class _Quiet(MemoryStore):
    """The same database, without the faults: numbering has tests of its own for them."""

    def __init__(self, store: MemoryStore) -> None:
        self._memory, self._connection = store._memory, store._connection

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        self._memory.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._memory.execute("ROLLBACK")
            raise
        self._memory.execute("COMMIT")


class Receiver:
    """Takes every event as soon as it is committed, and keeps the newest state of each thing."""

    def __init__(self, store: MemoryStore, clock: Any) -> None:
        self._store, self._clock = _Quiet(store), clock
        self._number = 0
        self._sequences: dict[str | None, int] = {}
        self.states: dict[str, dict[str, str]] = {"subscription": {}, "invoice": {}}

    def listen(self) -> None:
        publish(self._store, self._clock)
        for row in feed.after(self._store._connection, self._number, 10_000):
            data = json.loads(row.body)["data"]
            self._number = row.number
            last = self._sequences.get(data["subscription"], 0)
            assert data["sequence"] > last, f"{data['sequence']} after {last}"
            self._sequences[data["subscription"]] = data["sequence"]
            for kind, known in self.states.items():
                if state := data["state"][kind]:
                    known[state["reference_id"]] = state["status"]

    def misled(self) -> list[str]:
        """Where the newest that it was told is not what the books say."""
        self.listen()
        found = []
        for kind, table in (("subscription", tables.subscriptions), ("invoice", tables.invoices)):
            query = select(table.c.reference_id, table.c.status)
            for row in self._store._connection.execute(query):
                told = self.states[kind].get(row.reference_id)
                if told != row.status:
                    found.append(f"{kind} {row.reference_id} is {row.status}, told as {told}")
        return found
