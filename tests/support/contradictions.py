"""The invariants that production asks about, asked of a simulated book."""

from __future__ import annotations

from datetime import datetime, timedelta

from billing_worker.persistence.invariants.asking import ask
from billing_worker.persistence.invariants.cards import OF_AGE, usable_after
from billing_worker.persistence.store import Store
from billing_worker.services.monitoring.invariants import INVARIANTS, Invariant

EVERYTHING = range(1_000_000)

AT_ANY_TIME = tuple(one for one in INVARIANTS if one.done_by is None)

NOBODY_RENEWS_A_CARD = Invariant(
    "expired_card_is_dead", "A card that was refused for its age is dead.", usable_after(OF_AGE)
)

AT_REST = (
    NOBODY_RENEWS_A_CARD,
    *AT_ANY_TIME,
    # Nobody opens periods at the end, and nobody numbers events.
    *(one for one in INVARIANTS if one.done_by in {"billing.ring", "billing.reconcile"}),
)


def contradictions(store: Store, now: datetime, *, at_rest: bool) -> list[str]:
    with store.reading() as connection:
        return [
            f"{row.reference} breaks {invariant.name}"
            for invariant in (AT_REST if at_rest else AT_ANY_TIME)
            for row in ask(
                connection, invariant.question, now, now - timedelta(minutes=30), EVERYTHING
            )
        ]
