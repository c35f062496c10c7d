"""What a new card may collect now: the one place that decides it.

    due within the last day, never tried   ─▶ at once: it only waited for the card
    what it was given for                  ─▶ the oldest debt at once, the others a day apart
    what else it pays for                  ─▶ after these, a day apart, the oldest first
    older than 62 days on its day          ─▶ not by itself: a person decides
    of a suspended subscription            ─▶ only if the card was given for it

A debt is an unpaid invoice that another card could pay: in the recovery ladder or past its end, or
waiting for the customer. What may have been paid, or waits for a person for another reason, is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Origin
from billing_worker.domain.catch_up import AGE_CAP
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.subscription import SubscriptionStatus

APART = timedelta(days=1)
"""Between the debts that one new card collects: several debits in one second get disputed."""

_PAID_LATE = frozenset({SubscriptionStatus.SUSPENDED, SubscriptionStatus.ENDED})
"""What was given up there is all that a new card could be for."""


@dataclass(frozen=True, slots=True)
class Debt:
    invoice: Invoice
    subscription: SubscriptionStatus
    given_for: bool  # the card was given for its subscription


@dataclass(frozen=True, slots=True)
class Collected:
    """What becomes of the debts, as (before, after)."""

    dated: tuple[tuple[Invoice, Invoice], ...] = ()  # in the order of their dates
    held: tuple[tuple[Invoice, Invoice], ...] = ()  # too old: a person decides

    @property
    def changes(self) -> list[tuple[Invoice, Invoice]]:
        return [pair for pair in (*self.dated, *self.held) if pair[0] != pair[1]]


def is_payable_by_another(invoice: Invoice, subscription: SubscriptionStatus) -> bool:
    """Whether another card is what the unpaid invoice waits for, or would at least bring it on."""
    if invoice.status is InvoiceStatus.UNCOLLECTIBLE:
        return subscription in _PAID_LATE
    in_ladder = invoice.first_declined_at is not None and invoice.next_attempt_at is not None
    reason = invoice.reason or ""
    # The gateway would not even create an invoice with the old token.
    refused = invoices.GATEWAY_REFUSED in reason
    ended = reason.startswith((invoices.RECOVERY_ENDED, invoices.TOO_OLD))
    return in_ladder or invoice.give_up_at is not None or ended or refused


def collect(debts: Iterable[Debt], now: datetime, *, first_at: datetime) -> Collected:
    """Date the debts, or leave them to a person. `first_at`: when the first one is tried.

    Debts of a paused subscription keep their date aside until it is resumed.
    """
    dated: list[tuple[Invoice, Invoice]] = []
    held: list[tuple[Invoice, Invoice]] = []
    at = first_at
    for debt in sorted(debts, key=_order):
        invoice = debt.invoice
        if debt.subscription is SubscriptionStatus.SUSPENDED and not debt.given_for:
            held.append((invoice, invoice))
        elif _is_in_the_queue(invoice, now):
            dated.append((invoice, invoice))
        elif _has_just_become_due(invoice, now):
            dated.append((invoice, _dated(debt, now, now)))
        elif at - invoice.period_start > AGE_CAP:
            held.append((invoice, _left_to_a_person(invoice)))
        else:
            dated.append((invoice, _dated(debt, at, now)))
            at += APART
    return Collected(tuple(dated), tuple(held))


def _order(debt: Debt) -> tuple[bool, datetime, int]:
    return (not debt.given_for, debt.invoice.period_start, debt.invoice.id)


def _has_just_become_due(invoice: Invoice, now: datetime) -> bool:
    return invoice.first_declined_at is None and now - invoice.period_start <= APART


def _is_in_the_queue(invoice: Invoice, now: datetime) -> bool:
    """An earlier new card has dated it. It keeps its day: two cards in a row are no two debits."""
    at = invoice.next_attempt_at
    return invoice.next_origin is Origin.NEW_CARD and at is not None and at > now


def _dated(debt: Debt, at: datetime, now: datetime) -> Invoice:
    owed = replace(
        invoices.owed_again(debt.invoice, at),
        next_origin=Origin.NEW_CARD,
        reason=invoices.ONE_A_DAY if at > now else None,
    )
    return invoices.put_aside(owed) if debt.subscription is SubscriptionStatus.PAUSED else owed


def _left_to_a_person(invoice: Invoice) -> Invoice:
    """A step of recovery that is dated goes on; what has been given up stays so."""
    if invoice.status is not InvoiceStatus.OPEN or invoice.next_attempt_at is not None:
        return invoice
    return replace(invoice, reason=invoices.TOO_OLD, give_up_at=None)
