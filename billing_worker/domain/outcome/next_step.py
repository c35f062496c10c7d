"""Decides what happens to an invoice and its subscription after an attempt ended unpaid."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from billing_worker.domain import invoice as invoices
from billing_worker.domain import subscription as subscriptions
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.declines import DeclineClass, decline_for
from billing_worker.domain.dunning import (
    Declined,
    End,
    NextStep,
    Policy,
    Turn,
    after_decline,
    policy_named,
    steps_used,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.network_rules import never_again
from billing_worker.domain.outcome.attempt_result import Case, Conclusion, Context
from billing_worker.domain.outcome.distance import not_before, was_never_sold
from billing_worker.domain.subscription import Subscription, SubscriptionStatus


def next_step(
    case: Case, attempt: Attempt, policy: Policy, declines: list[Declined], context: Context
) -> NextStep:
    brand = case.card.brand if case.card else None
    never = never_again(brand, attempt.original_code, context.now)
    step = after_decline(
        policy,
        declines,
        case.subscription.schedule.tz,
        other_card=case.other_card,
        never=never.rule if never else None,
        equal_charge=_explains_alone(case, attempt),
    )
    step = _not_too_early(step, case, attempt, context)
    status = case.subscription.status
    if status is SubscriptionStatus.CANCELLED:
        return replace(step, at=None, turn=Turn.PERSON, rule="subscription.cancelled")
    if status is SubscriptionStatus.SUSPENDED and step.turn is Turn.OURS:
        # This attempt was on request. A suspended subscription gets no automatic attempt.
        return replace(step, at=None, turn=Turn.NOBODY, rule="subscription.suspended")
    return step


def _explains_alone(case: Case, attempt: Attempt) -> str | None:
    """Return the charge that this one is a duplicate of, unless it may be one of the same invoice:
    an earlier sale that ended without a refusal may have succeeded.
    """
    earlier = [one for one in case.earlier if one.id != attempt.id]
    refused = all(one.status is AttemptStatus.DECLINED or was_never_sold(one) for one in earlier)
    return case.equal_charge if refused else None


def _not_too_early(step: NextStep, case: Case, attempt: Attempt, context: Context) -> NextStep:
    """Delay the step while this attempt, or a previous one, may still be paid."""
    origin = step.origin or attempt.origin
    others = [one for one in case.earlier if one.id != attempt.id]
    earliest = not_before(origin, [*others, attempt], context.timings)
    if step.at is None or earliest is None or earliest <= step.at:
        return step
    return replace(step, at=earliest)


def why_never_again(case: Case, attempt: Attempt, resolution: str, context: Context) -> str | None:
    """Return why this decline forbids the stored card for ever, or None.

    The customer may use any card on a pay page: there only a network's code counts against the
    stored card.
    """
    hard = decline_for(resolution).kind is DeclineClass.HARD and attempt.origin is not Origin.LINK
    said_before = attempt.status is AttemptStatus.DECLINED and attempt.outcome == resolution
    brand = case.card.brand if case.card else None
    # A repeated statement of the same decline does not count: the card may be renewed since then.
    if (hard and not said_before) or never_again(brand, attempt.original_code, context.now):
        return f"declined_{DeclineClass.HARD}: {resolution}"
    return None


def declines_of(case: Case, attempt: Attempt) -> list[Declined]:
    """Return the invoice's declines, oldest first; the last one is this attempt's."""
    tries = [a for a in case.earlier if a.status is AttemptStatus.DECLINED and a.id != attempt.id]
    tries.sort(key=lambda earlier: earlier.number)
    return [Declined(a.origin, a.settled_at or a.created_at, a.outcome) for a in (*tries, attempt)]


def payment_failed(
    policy: Policy, declines: list[Declined], step: NextStep, context: Context
) -> Event:
    """Return the notice of a failed payment. It always tells what follows."""
    resolution = declines[-1].resolution
    return context.event(
        EventKind.PAYMENT_FAILED,
        attempt=1 + steps_used(declines),
        of=policy.attempts,
        resolution=resolution,
        because=decline_for(resolution).reason,
        follows=str(step.turn),
        next_attempt_at=step.at,
        waits_until=step.gives_up_at,
        consequence=str(policy.end),
        policy=policy.name,
        rule=step.rule,
    )


def stays_owed(
    case: Case, attempt: Attempt, step: NextStep, said: tuple[Event, ...], context: Context
) -> Conclusion:
    """Let an open invoice wait for its next step. Any other invoice is unchanged."""
    if case.invoice.status is not InvoiceStatus.OPEN:
        return Conclusion(replace(case, attempt=attempt), said[:1])
    step = _not_too_early(step, case, attempt, context)
    is_to_be_void = case.invoice.void_if_unpaid
    invoice = replace(
        case.invoice,
        reason=case.invoice.reason if is_to_be_void else step.reason,
        next_attempt_at=step.at,
        enqueue_at=step.at,
        next_origin=step.origin or attempt.origin,
        give_up_at=_patience(case, step, context),
    )
    waiting = context.event(
        EventKind.INVOICE_WAITING,
        reason=step.reason,
        rule=step.rule,
        next_attempt_at=step.at,
        alert=step.turn is Turn.PERSON,
    )
    subscription = case.subscription
    moved: tuple[Event, ...] = ()
    if subscription.status is SubscriptionStatus.ACTIVE:
        subscription, moved = move_subscription(
            subscription, SubscriptionStatus.PAST_DUE, step.reason, context
        )
    events = [*said, waiting, *moved, *_asked_of_the_customer(invoice, step, context)]
    if step.turn is Turn.NOBODY and not is_to_be_void:
        invoice, subscription, ended = give_up(invoice, subscription, step.rule, context)
        events += ended
    after = replace(case, attempt=attempt, invoice=invoice, subscription=subscription)
    return Conclusion(after, tuple(events))


def _patience(case: Case, step: NextStep, context: Context) -> datetime | None:
    if step.turn not in {Turn.CARD, Turn.CUSTOMER}:
        return None
    since = case.invoice.first_declined_at or context.now
    return step.gives_up_at or since + policy_named(case.subscription.dunning_policy).max_age


def _asked_of_the_customer(invoice: Invoice, step: NextStep, context: Context) -> list[Event]:
    kinds = {Turn.CARD: EventKind.CARD_NEEDED, Turn.CUSTOMER: EventKind.CUSTOMER_STEP_NEEDED}
    if step.turn not in kinds:
        return []
    kind, until = kinds[step.turn], invoice.give_up_at
    return [context.event(kind, reason=step.reason, rule=step.rule, until=until)]


def give_up(
    invoice: Invoice, subscription: Subscription, rule: str, context: Context
) -> tuple[Invoice, Subscription, list[Event]]:
    """End the recovery of an open invoice as its policy says. A late payment still pays it."""
    policy = policy_named(subscription.dunning_policy)
    stays = policy.end is End.LEAVE_OPEN
    invoice = replace(
        invoice,
        status=invoice.status if stays else invoices.move(invoice.status, _UNCOLLECTIBLE),
        reason=f"{invoices.RECOVERY_ENDED}{invoice.reason}",
        next_attempt_at=None,
        enqueue_at=None,
        give_up_at=None,
    )
    ended = context.event(
        EventKind.RECOVERY_ENDED,
        rule=rule,
        policy=policy.name,
        end=str(policy.end),
        invoice=str(invoice.status),
        alert=stays,
    )
    target = _STATUS_AT_END.get(policy.end)
    if target is None or subscription.status not in _STILL_BILLED:
        return invoice, subscription, [ended]
    subscription, moved = move_subscription(subscription, target, rule, context)
    subscription = replace(subscription, next_billing_at=None)
    if target is SubscriptionStatus.SUSPENDED:
        moved = (*moved, context.event(EventKind.SUBSCRIPTION_SUSPENDED, rule=rule))
    return invoice, subscription, [ended, *moved]


_UNCOLLECTIBLE = InvoiceStatus.UNCOLLECTIBLE

_STATUS_AT_END = {
    End.SUSPEND: SubscriptionStatus.SUSPENDED,
    End.CANCEL: SubscriptionStatus.CANCELLED,
}

_STILL_BILLED = frozenset({SubscriptionStatus.ACTIVE, SubscriptionStatus.PAST_DUE})
"""States that the policy's end changes. A paused, cancelled or ended subscription keeps its own."""


def owes_no_longer(
    subscription: Subscription, context: Context, *, owes_more: bool
) -> tuple[Subscription, tuple[Event, ...]]:
    """Return the subscription after an invoice was voided.

    It is no longer past due unless it `owes_more`. A suspended one stays so: this is no payment.
    """
    if subscription.status is not SubscriptionStatus.PAST_DUE or owes_more:
        return subscription, ()
    return move_subscription(subscription, SubscriptionStatus.ACTIVE, "nothing is owed", context)


def move_subscription(
    subscription: Subscription, to: SubscriptionStatus, why: str, context: Context
) -> tuple[Subscription, tuple[Event, ...]]:
    moved = replace(subscription, status=subscriptions.move(subscription.status, to))
    event = context.event(
        EventKind.SUBSCRIPTION_MOVED, before=str(subscription.status), after=str(to), why=why
    )
    return moved, (event,)
