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
    UNCOLLECTIBLE = "uncollectible"  # Given up by the policy; a late payment still pays it.
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
    # A waived period was not charged by this book. A time that it has lost may have charged it.
    InvoiceStatus.VOID: frozenset({InvoiceStatus.PAID}),
}


OWED = frozenset({InvoiceStatus.OPEN, InvoiceStatus.UNCOLLECTIBLE})
"""In these a customer may pay it: what was given up is still a debt until it is void."""


def move(current: InvoiceStatus, to: InvoiceStatus) -> InvoiceStatus:
    """Return `to`. Raises IllegalTransition when TRANSITIONS does not allow the change."""
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
    next_attempt_at: datetime | None  # date of the next step; None: no step is planned
    enqueue_at: datetime | None  # when a sweep next enqueues it; later while a worker has it
    not_charged_count: int  # submitted attempts that ended as not charged
    created_at: datetime
    paid_at: datetime | None
    paused_attempt_at: datetime | None = None  # date of the next step, kept during a pause
    next_origin: Origin = Origin.SCHEDULED  # the origin of the next attempt
    first_declined_at: datetime | None = None
    give_up_at: datetime | None = None  # until when to wait for the customer
    void_if_unpaid: bool = False  # an order: it is void as soon as what is in flight ends unpaid


def is_near(invoice: Invoice, instant: datetime) -> bool:
    """Whether the invoice's period begins at most one period length after `instant`."""
    one_earlier = invoice.period_start - (invoice.period_end - invoice.period_start)
    return one_earlier <= instant


WAIVED = "waived by "
"""Prefix of the reason of an invoice that the catch-up policy has voided; the rule follows."""


def takes_money(invoice: Invoice) -> bool:
    """Return whether a payment pays it: it is a debt, or a period that nobody was known to have
    charged in time. Other money is surplus.
    """
    if invoice.status is InvoiceStatus.VOID:
        return (invoice.reason or "").startswith(WAIVED)
    return invoice.status in OWED


PAUSED = "paused"
"""Reason of an invoice that waits because its subscription is paused."""

CANCELLED = "cancelled"
"""Reason of a void invoice whose subscription was cancelled."""


SUSPENDED = "suspended"
"""Reason of an invoice that waits because an older one suspended its subscription."""


TAKEN_BACK = "taken back: it became due after a decision that was told of later"
"""Reason of a void invoice: it was opened before an earlier decision became known. Its period may
become due again, with other terms or another date, under the same number."""


VOIDED = "voided: "
"""Prefix of the reason of an invoice that a named person has voided."""

VOID_IF_UNPAID = "void if it ends unpaid"
"""Reason of an invoice with a live attempt that is void as soon as the attempt ends unpaid."""

PAID_ELSEWHERE = "paid elsewhere: "
"""Prefix of the reason of an invoice that a named person has marked as paid; evidence follows."""


RECOVERY_ENDED = "recovery_ended: "
"""Prefix of the reason of an invoice whose retries, or whose wait for the customer, have ended."""

OVER_AGE = "its first unpaid attempt is older than"
"""Part of the reason when the next step came too late; the number of days follows."""

ONE_A_DAY = "one_debt_a_day"
"""Reason of an invoice that waits while a new card collects another one: one debit a day."""

TOO_OLD = "older_than_62_days"
"""Reason of an invoice that a new card could pay, but that is too old: a person decides."""

KEEPS_CRASHING = "keeps_crashing"
"""Prefix of the reason of an invoice whose charges crash the worker while others' do not."""

GATEWAY_REFUSED = "gateway refused the invoice"
"""Part of the reason when the gateway refused to create its invoice; the token may be the cause."""


EXPIRED_UNPROVEN = "expired_unproven"
"""Reason of a wait: a sale may have arrived before the gateway's invoice expired."""

EXPIRED_AGAIN = "expired_unproven_again"
"""Reason of a wait for a person: a second attempt has ended as `EXPIRED_UNPROVEN`."""


LATE_MONEY = "late_money_may_come"
"""Reason of a wait: an attempt was ordered, but an earlier one may still turn out paid."""

LATE_MONEY_WAITS = "late_money.wait"
"""The rule that sets the date of an attempt that waits for `LATE_MONEY`."""


def put_aside(invoice: Invoice, reason: str = PAUSED) -> Invoice:
    """Cancel the next step but keep its date. An invoice without a next step is unchanged."""
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
    """Undo `put_aside`. The customer's deadline moves by `waited`.

    The next step keeps its date. If that date has passed, the invoice is enqueued now. The claim of
    a first charge then finds that it `was_missed`, and the catch-up rules decide about it.
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
    """Make an open or uncollectible invoice due now: a card was given or an attempt ordered."""
    open_ = InvoiceStatus.OPEN
    return replace(
        invoice,
        status=open_ if invoice.status is open_ else move(invoice.status, open_),
        reason=None,
        next_attempt_at=now,
        enqueue_at=now,
        void_if_unpaid=False,
        give_up_at=None,
    )


def given_up_if_unpaid(invoice: Invoice) -> Invoice:
    """Give up an invoice with a live attempt: it is void as soon as the attempt ends unpaid."""
    return replace(
        invoice,
        reason=VOID_IF_UNPAID,
        void_if_unpaid=True,
        paused_attempt_at=None,
        next_attempt_at=None,
        enqueue_at=None,
        give_up_at=None,
    )


def paid_elsewhere(invoice: Invoice, evidence: str, now: datetime) -> Invoice:
    """Mark as paid in cash or by bank transfer. A payment at the gateway is surplus then."""
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
    """Reopen a paid invoice: a person withdraws their own statement that it was paid.

    TRANSITIONS has no such change: neither the gateway nor a timer may reopen a paid invoice.
    """
    return replace(invoice, status=InvoiceStatus.OPEN, paid_at=None)


def voided(invoice: Invoice, reason: str) -> Invoice:
    """Void the invoice: it is no longer owed. A later payment is surplus, to be refunded."""
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
