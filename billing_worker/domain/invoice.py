from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from billing_worker.domain.attempt import Origin
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
    InvoiceStatus.UNCOLLECTIBLE: frozenset(
        {InvoiceStatus.PAID, InvoiceStatus.OPEN, InvoiceStatus.VOID}
    ),
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
    enqueue_at: datetime | None  # when the sweep next rings for it; pushed on while it is worked on
    not_charged_count: int  # attempts that certainly never reached the card
    created_at: datetime
    paid_at: datetime | None
    paused_attempt_at: datetime | None = None  # the next step's date, kept aside during a pause
    next_origin: Origin = Origin.SCHEDULED  # of the next attempt: what decided that there is one
    first_declined_at: datetime | None = None
    give_up_at: datetime | None = None  # how long the customer is waited for


def is_near(invoice: Invoice, instant: datetime) -> bool:
    """Whether its period begins by then, or at most one period later."""
    one_earlier = invoice.period_start - (invoice.period_end - invoice.period_start)
    return one_earlier <= instant


PAUSED = "paused"
"""Why an invoice waits whose subscription is paused."""

CANCELLED = "cancelled"
"""Why an invoice is void whose subscription was cancelled."""


SUSPENDED = "suspended"
"""Why an invoice waits whose subscription was suspended for an older one."""


TAKEN_BACK = "taken back: it became due after a decision that was told of later"
"""Why an invoice is void that an earlier decision would have prevented. Its period may become due
again, on other terms or another date: it is then opened anew under the same number."""


VOIDED = "voided: "
"""Begins the reason of an invoice that a named person has voided."""

VOID_IF_UNPAID = "void if it ends unpaid"
"""Why an invoice in flight is not to be collected any further."""

PAID_ELSEWHERE = "paid elsewhere: "
"""Begins the reason of an invoice that a named person has marked as paid; evidence follows."""


RECOVERY_ENDED = "recovery_ended: "
"""Begins the reason of an invoice whose ladder is used up, or whose customer was waited for."""

OVER_AGE = "its first attempt without money is older than"
"""In the reason of an invoice whose next step came when its recovery was over; the days follow."""

KEEPS_CRASHING = "keeps_crashing"
"""Begins the reason of an invoice whose charges crashed, and others' did not."""

REFUSED = "gateway refused the invoice"
"""In the reason of an invoice for which the gateway created none: the fault may be the token's."""


EXPIRED = "expired_unproven"
"""Why an invoice waits whose sale may have arrived before the gateway's invoice expired."""

EXPIRED_AGAIN = "expired_unproven_again"
"""Why an invoice waits for a person: its second such attempt has ended like the first."""


LATE_MONEY = "late_money_may_come"
"""Why an invoice waits for which an attempt was asked, while an earlier one may still be paid."""

LATE_MONEY_WAITS = "late_money.wait"
"""The rule that says so, and dates the next attempt."""


def put_aside(invoice: Invoice, reason: str = PAUSED) -> Invoice:
    """Stop what was to happen next, and remember its date. What waits for a person still does."""
    if invoice.next_attempt_at is None:
        return invoice
    return replace(
        invoice,
        reason=reason,
        paused_attempt_at=invoice.next_attempt_at,
        next_attempt_at=None,
        enqueue_at=None,
    )


def take_up_again(invoice: Invoice, now: datetime, waited: timedelta) -> Invoice:
    """Undo `put_aside` after `waited`, by which the customer's own time is longer.

    The next step keeps its date. Where that has passed, the sweep rings now, and whoever claims a
    first charge finds that it `was_missed`: the catch-up rules decide about it.
    """
    if invoice.give_up_at is not None:
        invoice = replace(invoice, give_up_at=invoice.give_up_at + waited)
    at = invoice.paused_attempt_at
    if at is None:
        return invoice
    return replace(
        invoice, reason=None, paused_attempt_at=None, next_attempt_at=at, enqueue_at=max(at, now)
    )


def owed_again(invoice: Invoice, now: datetime) -> Invoice:
    """Due now, because somebody gave a card or asked for an attempt; also when it was given up."""
    open_ = InvoiceStatus.OPEN
    return replace(
        invoice,
        status=open_ if invoice.status is open_ else move(invoice.status, open_),
        reason=None,
        next_attempt_at=now,
        enqueue_at=now,
        give_up_at=None,
    )


def given_up_if_unpaid(invoice: Invoice) -> Invoice:
    """What is in flight cannot be taken back: it is void as soon as it has ended without money."""
    return replace(
        invoice,
        reason=VOID_IF_UNPAID,
        paused_attempt_at=None,
        next_attempt_at=None,
        enqueue_at=None,
        give_up_at=None,
    )


def paid_elsewhere(invoice: Invoice, evidence: str, now: datetime) -> Invoice:
    """Cash, a bank transfer. Money that the gateway takes all the same is surplus."""
    return replace(
        invoice,
        status=move(invoice.status, InvoiceStatus.PAID),
        reason=f"{PAID_ELSEWHERE}{evidence}",
        paid_at=now,
        paused_attempt_at=None,
        next_attempt_at=None,
        enqueue_at=None,
        give_up_at=None,
    )


def is_paid_elsewhere(reason: str | None) -> bool:
    return (reason or "").startswith(PAID_ELSEWHERE)


def owed_after_all(invoice: Invoice) -> Invoice:
    """A person takes back that it was paid. No edge of the table, where `paid` is final: nothing
    that the gateway or a clock says may come this way.
    """
    return replace(invoice, status=InvoiceStatus.OPEN, paid_at=None)


def voided(invoice: Invoice, reason: str) -> Invoice:
    """No longer owed. Money that arrives all the same is surplus, and goes back."""
    return replace(
        invoice,
        status=move(invoice.status, InvoiceStatus.VOID),
        reason=reason,
        paused_attempt_at=None,
        next_attempt_at=None,
        enqueue_at=None,
        give_up_at=None,
    )


def reference_for(subscription_reference: str, period_number: int) -> str:
    return f"{subscription_reference}-p{period_number}"
