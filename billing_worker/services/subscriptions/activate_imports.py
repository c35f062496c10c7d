"""Activates held imports, after an operator has seen what they will be charged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.subscription import BILLABLE, Subscription
from billing_worker.persistence import history, subscriptions
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store

ACTIVATE_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Activated:
    armed: int
    refused: dict[str, str] = field(default_factory=dict)  # reference -> reason


def arm(store: Store, clock: Clock, references: Sequence[str], *, by: str) -> Activated:
    """Activate the named imports: they are billed from their first unpaid period on. The others
    stay held.
    """
    armed = 0
    refused: dict[str, str] = {}
    for start in range(0, len(references), ACTIVATE_BATCH):
        page = list(dict.fromkeys(references[start : start + ACTIVATE_BATCH]))
        with store.transaction() as connection:
            known = {s.reference_id: s for s in subscriptions.lock_held(connection, page)}
            fit = [s for s in known.values() if s.status in BILLABLE]
            _arm(connection, fit, by, clock.now())
        armed += len(fit)
        refused |= {reference: _why_not(known.get(reference)) for reference in page
                    if known.get(reference) not in fit}  # fmt: skip
    return Activated(armed, refused)


def activate_all(store: Store, clock: Clock, *, by: str) -> Activated:
    """Activate every held import, in batches that are committed one by one."""
    armed = 0
    last_id = 0
    while True:
        with store.transaction() as connection:
            page = subscriptions.lock_held_page(connection, last_id, ACTIVATE_BATCH)
            fit = [s for s in page if s.status in BILLABLE]
            _arm(connection, fit, by, clock.now())
        armed += len(fit)
        if len(page) < ACTIVATE_BATCH:
            return Activated(armed)
        last_id = page[-1].id


def _why_not(held: Subscription | None) -> str:
    unknown = "is not held, not known, or handed over to another book"
    return unknown if held is None else f"is {held.status}"


def _arm(connection: Connection, fit: Sequence[Subscription], by: str, now: datetime) -> None:
    starts = [(s.id, s.start_of(s.next_period)) for s in fit]
    subscriptions.arm(connection, starts)
    history.write(
        connection,
        (
            Entry(
                Event(EventKind.SUBSCRIPTION_ARMED, now, by, {"next_billing_at": at}),
                subscription_id,
            )
            for subscription_id, at in starts
        ),
    )
