from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.money import Money


class InvoiceStatus(StrEnum):
    OPEN = "open"  # Owed. Has a next attempt, a live attempt, or a reason why neither.
    PAID = "paid"  # Collected once.
    UNCOLLECTIBLE = (
        "uncollectible"  # Given up by the policy; money that arrives late still pays it.
    )
    VOID = "void"  # No longer owed.


TRANSITIONS: Mapping[InvoiceStatus, frozenset[InvoiceStatus]] = {
    InvoiceStatus.OPEN: frozenset(
        {
            InvoiceStatus.PAID,
            InvoiceStatus.UNCOLLECTIBLE,
            InvoiceStatus.VOID,
        }
    ),
    InvoiceStatus.UNCOLLECTIBLE: frozenset({InvoiceStatus.PAID, InvoiceStatus.OPEN}),
    InvoiceStatus.PAID: frozenset(),
    InvoiceStatus.VOID: frozenset(),
}


def move(current: InvoiceStatus, to: InvoiceStatus) -> InvoiceStatus:
    """Return `to`, or raise IllegalTransition when the table has no such edge."""
    if to not in TRANSITIONS[current]:
        raise IllegalTransition(f"invoice: {current} -> {to}")
    return to


@dataclass(frozen=True, slots=True)
class Invoice:
    id: int
    reference_id: str
    subscription_id: int
    period_number: int
    period_start: datetime
    period_end: datetime
    money: Money
    status: InvoiceStatus
    reason: str | None  # why an open one waits, or why a void one is void
    next_attempt_at: datetime | None  # the next step's date; None: nothing happens by itself
    ring_at: datetime | None  # when the sweep next rings for it; pushed on while it is worked on
    not_charged_count: int  # attempts that certainly never reached the card
    created_at: datetime
    paid_at: datetime | None


def reference_for(subscription_reference: str, period_number: int) -> str:
    return f"{subscription_reference}-p{period_number}"
