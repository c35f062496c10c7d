"""Sweeps that find due rows and wake workers for them. The rows are the queue of record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from billing_worker.persistence import invoices
from billing_worker.services.ports import Ports

IDS_IN_A_MESSAGE = 20
"""Ids in one message. Small batches cost more, because a batch shares its claim. Large ones leave
another worker idle at the end, because a worker keeps its batches.
"""

RING_BATCH = 1_000
MAX_BATCHES = 20
POLL_LOST_AFTER = timedelta(seconds=10)
"""A poll that was lost is due again after this. Polling twice is harmless."""


def ring_due(ports: Ports) -> int:
    """Wake workers for open invoices without a worker. Returns how many were found."""
    return _sweep(lambda: _due_invoices(ports), lambda ids: ring_for(ports, ids))


def poll_due(ports: Ports) -> int:
    """Wake workers for attempts that are due for polling. Returns how many were found."""
    return _sweep(lambda: _due_attempts(ports), lambda ids: _in_pages(ids, ports.bell.poll))


def ring_for(ports: Ports, invoice_ids: Sequence[int]) -> None:
    _in_pages(invoice_ids, ports.bell.charge)


def _sweep(found: Callable[[], list[int]], ring: Callable[[list[int]], None]) -> int:
    total = 0
    for _ in range(MAX_BATCHES):
        ids = found()
        ring(ids)
        total += len(ids)
        if len(ids) < RING_BATCH:
            break
    return total


def _due_invoices(ports: Ports) -> list[int]:
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        return invoices.due_to_ring(connection, now, now + ports.timings.stuck_after, RING_BATCH)


def _due_attempts(ports: Ports) -> list[int]:
    now = ports.clock.now()
    again = now + max(ports.timings.reconcile_after, POLL_LOST_AFTER)
    with ports.store.transaction() as connection:
        return invoices.due_to_poll(connection, now, again, RING_BATCH)


def _in_pages(ids: Sequence[int], ring: Callable[[Sequence[int]], None]) -> None:
    for start in range(0, len(ids), IDS_IN_A_MESSAGE):
        ring(ids[start : start + IDS_IN_A_MESSAGE])
