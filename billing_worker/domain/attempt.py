"""One try to collect one invoice: its states, and the only ways between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.money import Money


class AttemptStatus(StrEnum):
    PREPARED = "prepared"  # Written down with its reference; no sale can have been sent.
    SUBMITTED = "submitted"  # The sale may have been sent: only the gateway's word ends this.
    SUCCEEDED = "succeeded"  # Paid, and it paid the invoice.
    DECLINED = "declined"  # The gateway's final "no", with a resolution.
    NOT_CHARGED = "not_charged"  # Certainly no money moved, and nobody declined it.
    SURPLUS = "surplus"  # Paid although the invoice no longer needed it: give it back.


class Origin(StrEnum):
    SCHEDULED = "scheduled"  # The period became due, or its first try never reached the card.
    DUNNING = "dunning"  # A step of the recovery ladder.
    MANUAL = "manual"  # A named person asked for it.
    LINK = "link"  # The customer paid on a page.
    NEW_CARD = "new_card"  # The card was replaced.
    BACKUP = "backup"  # The card is dead, and the customer has agreed to this other one.


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
    # Finals of the gateway are not frozen (gateway.md §0 H): late money is money.
    AttemptStatus.DECLINED: frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS}),
    AttemptStatus.NOT_CHARGED: frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS}),
    AttemptStatus.SUCCEEDED: frozenset(),
    AttemptStatus.SURPLUS: frozenset(),
}

LIVE = frozenset({AttemptStatus.PREPARED, AttemptStatus.SUBMITTED})
"""While one of these stands, no other attempt for the same invoice may start."""

PAID = frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS})


def move(current: AttemptStatus, to: AttemptStatus) -> AttemptStatus:
    """Return `to`, or raise IllegalTransition when the table has no such edge."""
    if to not in TRANSITIONS[current]:
        raise IllegalTransition(f"attempt: {current} -> {to}")
    return to


@dataclass(frozen=True, slots=True)
class Attempt:
    id: int
    invoice_id: int
    number: int  # 1, 2, 3 … within its invoice
    reference_id: str  # what the gateway knows it by
    status: AttemptStatus
    origin: Origin
    card_id: int | None  # None: the customer types a new card on a page
    money: Money
    test_mode: bool
    fence: int  # grows with every claim; a write under an older one is refused
    claims: int  # claims since the last one that was given back alive
    created_at: datetime
    lease_until: datetime | None
    gateway_id: str | None
    submitted_at: datetime | None
    settled_at: datetime | None
    next_poll_at: datetime | None  # when the gateway is asked next; None: never again
    rechecks: int  # how often a settled attempt was asked about again
    unpaid_since: datetime | None  # when the gateway first called it final and unpaid
    sale_status: str | None  # what the answer to the sale claimed: a hint
    sale_resolution: str | None
    outcome: str | None  # the gateway's words, or ours, that ended it
    original_code: str | None = None  # the acquirer's own code of a decline, where it is passed on
    heard_at: datetime | None = None  # when the gateway was asked for what we know of it
    undecided_since: datetime | None = None  # when the gateway took its "final and unpaid" back
    resolved_at: datetime | None = None  # when a named person said whether it was paid
    resolved_over: str | None = None  # what the gateway said then, as far as it was known


def reference_for(invoice_reference: str, number: int, prefix: str = "") -> str:
    """Deterministic, so that a lost process, or a copy of the database, finds its twin.

    A function of (subscription, period, attempt): the suffix keeps it injective. `prefix` is the
    book's: two books on one gateway account would find each other's invoices without it.
    """
    return f"{prefix}{invoice_reference}-a{number}"


_OF_AN_ATTEMPT = re.compile(r"(.+)-a([1-9][0-9]{0,5})", re.DOTALL)


def invoice_and_number(reference: str) -> tuple[str, int] | None:
    """The invoice and the attempt that a reference without a prefix names; None: it names none."""
    named = _OF_AN_ATTEMPT.fullmatch(reference)
    return (named[1], int(named[2])) if named else None
