"""Applies a statement that money was paid."""

from __future__ import annotations

from dataclasses import replace

from billing_worker.domain import attempt as attempts
from billing_worker.domain import invoice as invoices
from billing_worker.domain import subscription as subscriptions
from billing_worker.domain.attempt import Attempt, AttemptStatus
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.outcome.attempt_changes import asked_for_the_last_time, sold_elsewhere
from billing_worker.domain.outcome.attempt_result import Case, Conclusion, Context
from billing_worker.domain.outcome.next_step import move_subscription
from billing_worker.domain.statement import CHARGED_BACK_STATUSES, GIVEN_BACK_STATUSES, Finding
from billing_worker.domain.subscription import Subscription, SubscriptionStatus


def pay(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Apply a payment: it pays the invoice if that is still owed, and is surplus otherwise."""
    case = _no_longer_surplus(case, finding)
    if case.attempt.status in attempts.PAID:
        return _paid_already(case, finding, context)
    late = case.attempt.status is not AttemptStatus.SUBMITTED
    before: list[Event] = []
    if case.attempt.status is AttemptStatus.PREPARED:
        case, sold = sold_elsewhere(case, context)
        before.append(sold)
    attempt = case.attempt
    wanted = invoices.takes_money(case.invoice)
    status = AttemptStatus.SUCCEEDED if wanted else AttemptStatus.SURPLUS
    kind = EventKind.ATTEMPT_SUCCEEDED if wanted else EventKind.ATTEMPT_SURPLUS
    attempt = replace(
        attempt,
        status=attempts.move(attempt.status, status),
        outcome=finding.reason,
        settled_at=context.now,
        next_poll_at=None,
        lease_until=None,
        undecided_since=None,
    )
    said = context.event(kind, alert=late or not wanted, gateway_status=finding.reason, late=late)
    said_of_it = [*before, said, *_given_back(attempt, finding.reason, context)]
    if not wanted:
        return Conclusion(replace(case, attempt=attempt), tuple(said_of_it))
    invoice = replace(
        case.invoice,
        status=invoices.move(case.invoice.status, InvoiceStatus.PAID),
        reason=None,
        next_attempt_at=None,
        enqueue_at=None,
        give_up_at=None,
        paid_at=context.now,
    )
    paid = [context.event(EventKind.INVOICE_PAID, amount=str(invoice.money))]
    if invoice.first_declined_at is not None:
        paid.append(_recovered(invoice, attempt, context))
    subscription, moved = current_again(case.subscription, context, owes_more=case.owes_more)
    after = replace(case, attempt=attempt, invoice=invoice, subscription=subscription)
    return Conclusion(after, (*said_of_it, *paid, *moved))


def _no_longer_surplus(case: Case, finding: Finding) -> Case:
    """Let surplus money pay the invoice after a person has withdrawn that another attempt did."""
    is_owed = case.invoice.status in invoices.OWED
    is_surplus = case.attempt.status is AttemptStatus.SURPLUS
    if not (is_surplus and is_owed) or finding.reason in GIVEN_BACK_STATUSES:
        return case
    # TRANSITIONS has no such change: nothing else makes an invoice with surplus money owed again.
    return replace(case, attempt=replace(case.attempt, status=AttemptStatus.NOT_CHARGED))


def _paid_already(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Record each later status of a payment once. Attempt and invoice keep their states."""
    attempt = case.attempt
    if finding.reason == attempt.outcome:
        return Conclusion(asked_for_the_last_time(case), ())
    said = _given_back(attempt, finding.reason, context) or (
        context.event(EventKind.ATTEMPT_POLLED, found=finding.reason, before=attempt.outcome),
    )
    known = replace(case, attempt=replace(attempt, outcome=finding.reason))
    return Conclusion(asked_for_the_last_time(known), said)


def _given_back(attempt: Attempt, status: str, context: Context) -> tuple[Event, ...]:
    if status not in GIVEN_BACK_STATUSES:
        return ()
    # The alert of a surplus has asked for its refund, so the refund alerts nobody.
    asked_for = attempt.status is AttemptStatus.SURPLUS and status not in CHARGED_BACK_STATUSES
    return (context.event(EventKind.ATTEMPT_GIVEN_BACK, alert=not asked_for, status=status),)


def _recovered(invoice: Invoice, attempt: Attempt, context: Context) -> Event:
    since = invoice.first_declined_at or context.now
    return context.event(
        EventKind.PAYMENT_RECOVERED,
        amount=str(invoice.money),
        origin=str(attempt.origin),
        attempts=attempt.number,
        days=(context.now - since).days,
    )


def current_again(
    subscription: Subscription, context: Context, *, owes_more: bool
) -> tuple[Subscription, tuple[Event, ...]]:
    """Return the subscription after a payment, with the events of its change.

    `owes_more`: another of its invoices is in recovery, or waits for a person.
    """
    if subscription.status is SubscriptionStatus.SUSPENDED:
        return _reactivated(subscription, context, owes_more=owes_more)
    if subscription.status is not SubscriptionStatus.PAST_DUE or owes_more:
        return subscription, ()
    return move_subscription(subscription, SubscriptionStatus.ACTIVE, "paid", context)


def _reactivated(
    subscription: Subscription, context: Context, *, owes_more: bool
) -> tuple[Subscription, tuple[Event, ...]]:
    active = subscriptions.reactivate(subscription, context.now)
    if owes_more and active.status is SubscriptionStatus.ACTIVE:
        active = replace(active, status=subscriptions.move(active.status, _PAST_DUE))
    event = context.event(
        EventKind.SUBSCRIPTION_MOVED,
        before=str(subscription.status),
        after=str(active.status),
        why="paid",
        periods_not_billed=list(range(subscription.next_period, active.next_period)),
        next_billing_at=active.next_billing_at,
    )
    return active, (event,)


_PAST_DUE = SubscriptionStatus.PAST_DUE
