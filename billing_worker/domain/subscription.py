"""An agreement to pay an amount every period, and the periods that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from billing_worker.domain.calendar import Schedule
from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.money import Money


class SubscriptionStatus(StrEnum):
    TRIALING = "trialing"  # Before its first charge.
    ACTIVE = "active"
    PAST_DUE = "past_due"  # Owes a period; the next ones still become due.
    SUSPENDED = "suspended"  # Recovery ended without money; nothing becomes due.
    PAUSED = "paused"
    CANCELLED = "cancelled"
    ENDED = "ended"  # All its periods have been billed.


_S = SubscriptionStatus
TRANSITIONS: Mapping[SubscriptionStatus, frozenset[SubscriptionStatus]] = {
    _S.TRIALING: frozenset({_S.ACTIVE, _S.PAST_DUE, _S.PAUSED, _S.CANCELLED, _S.ENDED}),
    _S.ACTIVE: frozenset({_S.PAST_DUE, _S.PAUSED, _S.CANCELLED, _S.ENDED}),
    _S.PAST_DUE: frozenset({_S.ACTIVE, _S.SUSPENDED, _S.PAUSED, _S.CANCELLED, _S.ENDED}),
    _S.SUSPENDED: frozenset({_S.ACTIVE, _S.CANCELLED, _S.ENDED}),
    _S.PAUSED: frozenset({_S.ACTIVE, _S.PAST_DUE, _S.CANCELLED, _S.ENDED}),
    _S.CANCELLED: frozenset(),
    _S.ENDED: frozenset(),
}

BILLABLE = frozenset({_S.TRIALING, _S.ACTIVE, _S.PAST_DUE})
"""In these a new period may become due."""

COLLECTABLE = frozenset({_S.TRIALING, _S.ACTIVE, _S.PAST_DUE, _S.ENDED})
"""In these an open invoice may be charged: an ended subscription still owes what it used."""


def move(current: SubscriptionStatus, to: SubscriptionStatus) -> SubscriptionStatus:
    """Return `to`, or raise IllegalTransition when the table has no such edge."""
    if to not in TRANSITIONS[current]:
        raise IllegalTransition(f"subscription: {current} -> {to}")
    return to


@dataclass(frozen=True, slots=True)
class Subscription:
    id: int
    reference_id: str
    customer_id: int
    card_id: int | None
    status: SubscriptionStatus
    money: Money
    schedule: Schedule
    ends_after_periods: int | None
    next_period: int  # number of the first period without an invoice
    next_billing_at: datetime | None  # its start; None: no further period becomes due
    description: str | None = None


@dataclass(frozen=True, slots=True)
class DuePeriod:
    number: int
    start: datetime
    end: datetime


def open_next_period(subscription: Subscription, now: datetime) -> tuple[DuePeriod, Subscription]:
    """Take the next due period and return it with the subscription moved past it.

    One period a call: what to do with a backlog is the catch-up policy's decision. The caller
    writes both in one transaction, so that a period is opened exactly once.
    """
    number = subscription.next_period
    start, end = subscription.schedule.period(number)
    if start > now:
        raise IllegalTransition(f"period {number} starts at {start.isoformat()}, after now")
    following = number + 1
    last = subscription.ends_after_periods
    ended = last is not None and following >= last
    status = subscription.status
    if ended:
        status = move(status, SubscriptionStatus.ENDED)
    elif status is SubscriptionStatus.TRIALING:
        status = move(status, SubscriptionStatus.ACTIVE)
    moved = replace(
        subscription,
        status=status,
        next_period=following,
        next_billing_at=None if ended else end,
    )
    return DuePeriod(number, start, end), moved
