"""What is written into the append-only history, and what each kind means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    SUBSCRIBED = "subscription.subscribed"
    SUBSCRIPTION_CHANGED = "subscription.changed"
    SUBSCRIPTION_MOVED = "subscription.moved"  # status changed
    INVOICE_OPENED = "invoice.opened"  # a period became due
    INVOICE_WAITING = "invoice.waiting"  # open, next step decided or nobody's turn
    INVOICE_PAID = "invoice.paid"
    INVOICE_VOIDED = "invoice.voided"
    ATTEMPT_PREPARED = "attempt.prepared"  # written down, not yet at the gateway
    ATTEMPT_CLAIMED = "attempt.claimed"  # taken over from a worker that went away
    ATTEMPT_POSTPONED = "attempt.postponed"  # given back, same attempt later
    ATTEMPT_SUBMITTED = "attempt.submitted"  # committed; the sale follows
    ATTEMPT_SUCCEEDED = "attempt.succeeded"
    ATTEMPT_DECLINED = "attempt.declined"
    ATTEMPT_NOT_CHARGED = "attempt.not_charged"
    ATTEMPT_SURPLUS = "attempt.surplus"  # paid, but not owed: refund
    ATTEMPT_LOOKED = "attempt.looked"  # asked the gateway, nothing decided
    ATTEMPT_UNPAID_FINAL = "attempt.unpaid_final"  # the gateway ended it; grace runs
    ATTEMPT_QUARANTINED = "attempt.quarantined"  # the answer does not fit the order
    ATTEMPT_CONTRADICTED = "attempt.contradicted"  # news that a final state does not allow
    SALES_SWITCHED = "sales.switched"


@dataclass(frozen=True, slots=True)
class Event:
    """One line of history. `data` is JSON and holds no secret; `by` is who decided."""

    kind: EventKind
    at: datetime
    by: str
    data: Mapping[str, Any] = field(default_factory=dict)
    alert: bool = False  # a person has to look
