"""An attempt is one try to collect one invoice: its states and their allowed transitions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.money import Money


class AttemptStatus(StrEnum):
    PREPARED = "prepared"  # Recorded with its reference; this database has sent no sale.
    SUBMITTED = "submitted"  # The sale may have been sent; the gateway or a named person ends this.
    SUCCEEDED = "succeeded"  # The payment paid the invoice.
    DECLINED = "declined"  # The gateway's final "no", with a resolution.
    NOT_CHARGED = "not_charged"  # Ended unpaid, certainly or after the grace, and not declined.
    SURPLUS = "surplus"  # Paid, but the invoice was no longer owed: to be refunded.


class Origin(StrEnum):
    SCHEDULED = "scheduled"  # First charge of a due period, or its repetition after `not_charged`.
    DUNNING = "dunning"  # A retry by the dunning policy.
    MANUAL = "manual"  # A named person ordered it.
    LINK = "link"  # The customer pays on a page.
    NEW_CARD = "new_card"  # The card was replaced.
    BACKUP = "backup"  # The card is dead, and the customer has agreed to a backup card.


TRANSITIONS: Mapping[AttemptStatus, frozenset[AttemptStatus]] = {
    AttemptStatus.PREPARED: frozenset({AttemptStatus.SUBMITTED, AttemptStatus.NOT_CHARGED}),
    AttemptStatus.SUBMITTED: frozenset(
        {
            AttemptStatus.SUCCEEDED,
            AttemptStatus.DECLINED,
            AttemptStatus.NOT_CHARGED,
            AttemptStatus.SURPLUS,
        }
    ),
    # A final status of the gateway may still change (gateway.md §0 H): late money is accepted.
    AttemptStatus.DECLINED: frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS}),
    AttemptStatus.NOT_CHARGED: frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS}),
    AttemptStatus.SUCCEEDED: frozenset(),
    AttemptStatus.SURPLUS: frozenset(),
}

LIVE = frozenset({AttemptStatus.PREPARED, AttemptStatus.SUBMITTED})
"""While an attempt is in one of these states, no other attempt of its invoice may start."""

PAID = frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS})


SUSPECTED = "looked for: a time that the books have lost may have made it"
"""Outcome of an attempt that this book has not made. It was written down so that the gateway is
polled under its reference."""


def move(current: AttemptStatus, to: AttemptStatus) -> AttemptStatus:
    """Return `to`. Raises IllegalTransition when TRANSITIONS does not allow the change."""
    if to not in TRANSITIONS[current]:
        raise IllegalTransition(f"attempt: {current} -> {to}")
    return to


@dataclass(frozen=True, slots=True)
class Attempt:
    id: int
    invoice_id: int
    number: int  # 1, 2, 3 … within its invoice
    reference_id: str  # our reference at the gateway
    status: AttemptStatus
    origin: Origin
    card_id: int | None  # None: the customer types a new card on a page
    money: Money
    test_mode: bool
    fence: int  # grows with every claim; a write with an older fence is refused
    claims: int  # claims since the attempt was last postponed
    created_at: datetime
    lease_until: datetime | None
    gateway_id: str | None
    submitted_at: datetime | None
    settled_at: datetime | None
    next_poll_at: datetime | None  # when the gateway is asked next; None: never again
    rechecks: int  # polls after the attempt had ended
    unpaid_since: datetime | None  # when the gateway first called it final and unpaid
    sale_status: str | None  # status in the answer to the sale: a hint, no proof
    sale_resolution: str | None
    outcome: str | None  # why it ended, in the gateway's words or in ours
    original_code: str | None = None  # the acquirer's decline code, if the gateway passes it on
    heard_at: datetime | None = None  # when the newest applied poll was sent
    undecided_since: datetime | None = None  # when a final, unpaid status became undecided again
    resolved_at: datetime | None = None  # when a named person said whether it was paid
    resolved_over: str | None = None  # the gateway's last statement at that time, if known
    maybe_sold: bool = False
    """Prepared, and found at the gateway by books that cannot tell whether they have sold it."""


def reference_for(invoice_reference: str, number: int, prefix: str = "") -> str:
    """Return the attempt's reference at the gateway: `<prefix><invoice_reference>-a<number>`.

    It depends on nothing else, so a restarted worker, or a copy of the database, finds the same
    gateway invoice by it. `prefix` belongs to the book: without it, two books on one gateway
    account would find each other's invoices.
    """
    return f"{prefix}{invoice_reference}-a{number}"


_OF_AN_ATTEMPT = re.compile(r"(.+)-a([1-9][0-9]{0,5})", re.DOTALL)


def invoice_and_number(reference: str) -> tuple[str, int] | None:
    """Split a reference without a prefix into invoice reference and attempt number, or None."""
    named = _OF_AN_ATTEMPT.fullmatch(reference)
    return (named[1], int(named[2])) if named else None
