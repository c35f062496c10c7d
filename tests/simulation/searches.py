"""When the worker next searches for charges that its books have forgotten: no row has that date."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from billing_worker.persistence import switches
from billing_worker.persistence.counters import last_counted
from billing_worker.persistence.forgotten_charges import left_without_a_look
from billing_worker.persistence.store import Store
from billing_worker.services.charging.forgotten_charges import EVERY


@dataclass(slots=True)
class Searches:
    start: datetime
    last: datetime | None = None

    def next(self, store: Store) -> datetime | None:
        """When the next search may find something, or None."""
        with store.reading() as connection:
            lost_at = switches.restored_at(connection)
            if lost_at is None:
                return None
            first = switches.unsearched_since(connection) or lost_at
            if not left_without_a_look(connection, lost_at, first, self.start):
                return None
            searched_at = last_counted(connection, "forgotten_charges")
        if searched_at == self.last:
            return None  # The last search has left what was not near the loss.
        self.last = searched_at
        return searched_at and searched_at + EVERY
