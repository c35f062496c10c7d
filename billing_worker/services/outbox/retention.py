"""Deletes old events. Events that an endpoint or the queue still needs are kept."""

from __future__ import annotations

from datetime import timedelta

from billing_worker.clock import Clock
from billing_worker.persistence.outbox import feed
from billing_worker.persistence.store import Store

FORGET_BATCH = 1_000


def forget(store: Store, clock: Clock, keep: timedelta | None) -> int:
    """Delete events that are older. Returns how many. None keeps them for ever."""
    if keep is None:
        return 0
    total = 0
    while True:
        with store.transaction() as connection:
            deleted = feed.forget(connection, clock.now() - keep, FORGET_BATCH)
        total += deleted
        if deleted < FORGET_BATCH:
            return total
