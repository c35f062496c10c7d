"""Deletes events that are old. What an endpoint or the queue has not been sent yet is kept."""

from __future__ import annotations

from datetime import timedelta

from billing_worker.clock import Clock
from billing_worker.persistence.store import Store
from billing_worker.persistence.told import feed

FORGET_BATCH = 1_000


def forget(store: Store, clock: Clock, keep: timedelta | None) -> int:
    """Returns how many events were deleted. None keeps them for ever."""
    if keep is None:
        return 0
    total = 0
    while True:
        with store.transaction() as connection:
            deleted = feed.forget(connection, clock.now() - keep, FORGET_BATCH)
        total += deleted
        if deleted < FORGET_BATCH:
            return total
