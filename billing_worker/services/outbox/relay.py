"""Passes the feed to a queue of other systems, in order, each event at least once."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from billing_worker.clock import Clock
from billing_worker.persistence.outbox import feed
from billing_worker.persistence.store import Store

RELAY_BATCH: Final = 500
RELAY_LEASE: Final = timedelta(seconds=60)

Send = Callable[[dict[str, Any]], bool]
"""Sends one event to the broker. False: the broker is unreachable."""


def relay(store: Store, clock: Clock, send: Send) -> int:
    """Send new events. Returns how many were sent.

    One process at a time, under a lease. If it dies, the next one sends its last batch again. The
    first run begins with the events after it: older ones are in the feed.
    """
    total = 0
    while True:
        now = clock.now()
        with store.transaction() as connection:
            claimed = feed.claim_queue(connection, now, now + RELAY_LEASE)
        if claimed is None:
            return total
        with store.reading() as connection:
            rows = feed.after(connection, claimed.after, RELAY_BATCH)
        sent = claimed.after
        for row in rows:
            if not send(json.loads(row.body)):
                break
            sent = row.number
            total += 1
        with store.transaction() as connection:
            feed.queued(connection, claimed, sent)
        if not rows or sent < rows[-1].number or len(rows) < RELAY_BATCH:
            return total
