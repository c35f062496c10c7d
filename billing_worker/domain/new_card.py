"""Decides which unpaid invoices a new card collects, and when.

    due within the last day, not declined          ─▶ at once: it only waited for a card
    of the subscription that the card is for       ─▶ the oldest at once, the others a day apart
    of another subscription that the card pays     ─▶ after these, a day apart, oldest first
    older than 62 days on its day                  ─▶ not automatically: a person decides
    of a suspended subscription                    ─▶ only if the card was given for it

A debt is an unpaid invoice that another card could pay: it is in recovery, or recovery has ended,
or it waits for the customer. An invoice that may have been paid, or that waits for a person for
another reason, is no debt here.
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
"""Time between two debits of one new card: customers dispute several debits in one second."""

_PAID_LATE = frozenset({SubscriptionStatus.SUSPENDED, SubscriptionStatus.ENDED})
"""States in which a new card may still pay an uncollectible invoice."""


@dataclass(frozen=True, slots=True)
class Debt:
    invoice: Invoice
    subscription: SubscriptionStatus
    given_for: bool  # the card was given for its subscription


@dataclass(frozen=True, slots=True)
class Collected:
    """The decisions about all debts, as (invoice before, invoice after)."""

    dated: tuple[tuple[Invoice, Invoice], ...] = ()  # in the order of their dates
    held: tuple[tuple[Invoice, Invoice], ...] = ()  # too old: a person decides

    @property
    def changes(self) -> list[tuple[Invoice, Invoice]]:
        return [pair for pair in (*self.dated, *self.held) if pair[0] != pair[1]]


def is_payable_by_another(invoice: Invoice, subscription: SubscriptionStatus) -> bool:
    """Whether the unpaid invoice could be paid with another card. One that is to be void when the
    page in front of its customer ends unpaid is no debt any more.
    """
    if invoice.void_if_unpaid:
        return False
    if invoice.status is InvoiceStatus.UNCOLLECTIBLE:
        return subscription in _PAID_LATE
    in_ladder = invoice.first_declined_at is not None and invoice.next_attempt_at is not None
    reason = invoice.reason or ""
    # The gateway has refused to create an invoice, perhaps because of the old token.
    refused = invoices.GATEWAY_REFUSED in reason
    ended = reason.startswith((invoices.RECOVERY_ENDED, invoices.TOO_OLD))
    return in_ladder or invoice.give_up_at is not None or ended or refused


def collect(debts: Iterable[Debt], now: datetime, *, first_at: datetime) -> Collected:
    """Set the dates of the debts, from `first_at` on, or leave them to a person.

    A debt of a paused subscription keeps its date until the pause ends.
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
    """Whether an earlier new card has set its date. It keeps that date: one debit, not two."""
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
    """Let the invoice wait for a person, unless it has a next step or is uncollectible."""
    if invoice.status is not InvoiceStatus.OPEN or invoice.next_attempt_at is not None:
        return invoice
    return replace(invoice, reason=invoices.TOO_OLD, give_up_at=None)
