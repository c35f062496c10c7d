"""When the worker next searches for charges that its books have forgotten: no row has that date."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from billing_worker.persistence import switches
from billing_worker.persistence.counters import last_counted
from billing_worker.persistence.forgotten_charges import left_without_a_look
from billing_worker.persistence.store import Store
from billing_worker.services.charging.forgotten_charges import EVERY_LATER


@dataclass(slots=True)
class Searches:
    start: datetime
    searched_at: datetime | None = None
    left: tuple[int, ...] = ()
    is_over: bool = False

    def next(self, store: Store) -> datetime | None:
        """When the next search may find something, or None."""
        with store.reading() as connection:
            lost_at = switches.restored_at(connection)
            if lost_at is None:
                return None
            since = switches.searched_until(connection) or lost_at
            left = tuple(left_without_a_look(connection, lost_at, since, self.start))
            searched_at = last_counted(connection, "forgotten_charges")
        # A search that leaves what the one before has left has found it to be not near the loss.
        is_the_same = left == self.left
        self.is_over = is_the_same and (self.is_over or searched_at != self.searched_at)
        self.searched_at, self.left = searched_at, left
        if not left or self.is_over:
            return None
        return (searched_at or lost_at) + EVERY_LATER
