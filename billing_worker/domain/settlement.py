"""The one place where news about an attempt becomes a new state of attempt, invoice, subscription.

Response, poll, callback, operator: all news passes through `conclude`, which is pure. Late and
repeated news never moves a state back; what does not fit is written down and shown to a person.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from billing_worker.domain import attempt as attempts
from billing_worker.domain import invoice as invoices
from billing_worker.domain import subscription as subscriptions
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.card import Card
from billing_worker.domain.declines import decline_for
from billing_worker.domain.dunning import (
    Declined,
    End,
    NextStep,
    Policy,
    Turn,
    after_decline,
    after_not_charged,
    after_refusal,
    hold,
    policy_named,
    steps_used,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.evidence import (
    DECLINED_STATUSES,
    UNSOLD_STATUSES,
    Expected,
    Finding,
    Statement,
    Verdict,
    judge,
)
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.network_rules import never_again
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.domain.terms import Terms

RECHECKS = (timedelta(hours=1), timedelta(days=1), timedelta(days=3))
"""When a final, unpaid attempt is asked about again, counted from its end (gateway.md §11.8)."""

NOT_SENT = "not_sent"
"""Kept as the sale's status when the frame that armed the attempt knows that no sale left it."""

EAGER_LOOKS_FOR = timedelta(days=1)
LONGEST_EAGER_WAIT = timedelta(minutes=5)
"""An outage of hours must not stretch the wait: 10 minutes after it heals everything is known."""
PATIENT_WAIT = timedelta(hours=1)


# --- news -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stated:
    """The gateway stated this about the attempt's invoice."""

    statement: Statement


@dataclass(frozen=True, slots=True)
class NothingSent:
    """The frame that owns the attempt knows that no sale left it, and gives the attempt up."""

    reason: str
    hold: bool = False  # True: repeating it would fail the same way
    statement: Statement | None = None  # the gateway's invoice that was not sold, if any


@dataclass(frozen=True, slots=True)
class Postponed:
    """The frame gives a prepared attempt back: same attempt, later. No money call was made."""

    reason: str


@dataclass(frozen=True, slots=True)
class Forbidden:
    """A rule stands against a prepared attempt, so nothing was sold. `again_at` None: for ever."""

    rule: str
    reason: str
    again_at: datetime | None


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Asking, or selling, brought no usable answer. Proves nothing."""

    reason: str


@dataclass(frozen=True, slots=True)
class NeverHandedOut:
    """The lease of a prepared pay link ran out: nobody was given its page, so nobody can pay."""


News = Stated | NothingSent | Postponed | Forbidden | NoAnswer | NeverHandedOut


# --- what is decided ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """An attempt with the invoice and the subscription that it belongs to.

    What follows a decline also depends on the invoice's earlier attempts and on the customer's
    cards: they are read when the news may be a decline, and only then.
    """

    attempt: Attempt
    invoice: Invoice
    subscription: Subscription
    earlier: tuple[Attempt, ...] = ()
    card: Card | None = None
    other_card: Origin | None = None  # another card that may be charged now, and as what


@dataclass(frozen=True, slots=True)
class Conclusion:
    case: Case
    events: tuple[Event, ...]
    kills_card: str | None = None  # why the attempt's card must never be charged again
    pauses_service: str | None = None  # why nothing may be charged through the service for now


@dataclass(frozen=True, slots=True)
class Context:
    now: datetime
    by: str  # who brings the news: "charge", "reconcile", "operator:ann" …
    terms: Terms

    def event(self, kind: EventKind, *, alert: bool = False, **data: object) -> Event:
        return Event(kind, self.now, self.by, data, alert)


def conclude(case: Case, news: News, context: Context) -> Conclusion:
    """Apply one piece of news. Pure; raises IllegalTransition only for a bug of ours."""
    return _while_paused_or_over(case, _told(case, news, context), context)


def _while_paused_or_over(before: Case, concluded: Conclusion, context: Context) -> Conclusion:
    """What was in flight when its subscription was paused or cancelled has ended without money."""
    case = concluded.case
    just_ended = before.attempt.status in attempts.LIVE and case.attempt.status not in attempts.LIVE
    if not just_ended or case.invoice.status is not InvoiceStatus.OPEN:
        return concluded
    if case.subscription.status is SubscriptionStatus.PAUSED:
        aside = replace(case, invoice=invoices.put_aside(case.invoice))
        return replace(concluded, case=aside)
    if case.subscription.status is SubscriptionStatus.CANCELLED:
        void = replace(case, invoice=invoices.voided(case.invoice, invoices.CANCELLED))
        said = context.event(EventKind.INVOICE_VOIDED, reason=invoices.CANCELLED)
        return Conclusion(void, (*concluded.events, said))
    return concluded


def _told(case: Case, news: News, context: Context) -> Conclusion:  # noqa: PLR0911 - a case each
    match news:
        case Stated(statement) if case.attempt.gateway_id not in {None, statement.gateway_id}:
            return _about_another_invoice(case, statement, context)
        case Stated(statement):
            return _stated(_with_gateway_id(case, statement), statement, context)
        case NothingSent():
            return _nothing_sent(case, news, context)
        case Postponed(reason):
            return _postponed(case, reason, context)
        case Forbidden():
            return _forbidden(case, news, context)
        case NoAnswer(reason):
            looked = context.event(EventKind.ATTEMPT_LOOKED, found="no answer", reason=reason)
            return Conclusion(_ask_again(case, context), (looked,))
        case NeverHandedOut():
            return _never_handed_out(case, context)


def _about_another_invoice(case: Case, statement: Statement, context: Context) -> Conclusion:
    """A repeated create left a second invoice under our reference: it says nothing of the sold one."""
    evidence = f"{statement.gateway_id} is {statement.status}, ours is {case.attempt.gateway_id}"
    said = context.event(EventKind.ATTEMPT_QUARANTINED, alert=True, evidence=evidence)
    return Conclusion(case, (said,))


def _with_gateway_id(case: Case, statement: Statement) -> Case:
    attempt = case.attempt
    if attempt.gateway_id is None and statement.reference_id == attempt.reference_id:
        attempt = replace(attempt, gateway_id=statement.gateway_id)
    if statement.status in DECLINED_STATUSES and statement.original_code is not None:
        attempt = replace(attempt, original_code=statement.original_code)
    return replace(case, attempt=attempt)


def _stated(case: Case, statement: Statement, context: Context) -> Conclusion:
    attempt = case.attempt
    finding = judge(
        statement, Expected(attempt.reference_id, attempt.money, test_mode=attempt.test_mode)
    )
    if finding.verdict is Verdict.PAID:
        return _paid(case, finding, context)
    match attempt.status:
        case AttemptStatus.PREPARED if finding.verdict is Verdict.DECLINED:
            return _declined(_sold_by_a_twin(case), finding.reason, context)
        case AttemptStatus.PREPARED:
            return _unsold(case, statement, finding, context)
        case AttemptStatus.SUBMITTED:
            return _undecided_or_unpaid(case, finding, context)
        case AttemptStatus.DECLINED | AttemptStatus.NOT_CHARGED:
            return _rechecked(case, finding, context)
        case AttemptStatus.SUCCEEDED | AttemptStatus.SURPLUS:
            return _contradicted(case, finding, context)


# --- paid -----------------------------------------------------------------------------------


def _paid(case: Case, finding: Finding, context: Context) -> Conclusion:
    attempt = case.attempt
    if attempt.status in {AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS}:
        return Conclusion(_asked_for_the_last_time(case), ())
    late = attempt.status is not AttemptStatus.SUBMITTED
    if attempt.status is AttemptStatus.PREPARED:
        attempt = _sold_by_a_twin(case).attempt
    wanted = case.invoice.status in {InvoiceStatus.OPEN, InvoiceStatus.UNCOLLECTIBLE}
    status = AttemptStatus.SUCCEEDED if wanted else AttemptStatus.SURPLUS
    kind = EventKind.ATTEMPT_SUCCEEDED if wanted else EventKind.ATTEMPT_SURPLUS
    attempt = replace(
        attempt,
        status=attempts.move(attempt.status, status),
        outcome=finding.reason,
        settled_at=context.now,
        look_at=None,
        lease_until=None,
    )
    said = context.event(kind, alert=late or not wanted, gateway_status=finding.reason, late=late)
    if not wanted:
        return Conclusion(replace(case, attempt=attempt), (said,))
    invoice = replace(
        case.invoice,
        status=invoices.move(case.invoice.status, InvoiceStatus.PAID),
        reason=None,
        next_attempt_at=None,
        ring_at=None,
        give_up_at=None,
        paid_at=context.now,
    )
    paid = [context.event(EventKind.INVOICE_PAID, amount=str(invoice.money))]
    if invoice.first_declined_at is not None:
        paid.append(_recovered(invoice, attempt, context))
    subscription, moved = _current_again(case.subscription, context)
    return Conclusion(Case(attempt, invoice, subscription), (said, *paid, *moved))


def _recovered(invoice: Invoice, attempt: Attempt, context: Context) -> Event:
    since = invoice.first_declined_at or context.now
    return context.event(
        EventKind.PAYMENT_RECOVERED,
        amount=str(invoice.money),
        origin=str(attempt.origin),
        attempts=attempt.number,
        days=(context.now - since).days,
    )


def _sold_by_a_twin(case: Case) -> Case:
    """A copy of this database, or its life before a restore, has sold what we only prepared."""
    submitted = attempts.move(case.attempt.status, AttemptStatus.SUBMITTED)
    return replace(case, attempt=replace(case.attempt, status=submitted))


def _asked_for_the_last_time(case: Case) -> Case:
    return replace(case, attempt=replace(case.attempt, look_at=None))


def _current_again(
    subscription: Subscription, context: Context
) -> tuple[Subscription, tuple[Event, ...]]:
    if subscription.status is SubscriptionStatus.SUSPENDED:
        return _reactivated(subscription, context)
    if subscription.status is not SubscriptionStatus.PAST_DUE:
        return subscription, ()
    return _move_subscription(subscription, SubscriptionStatus.ACTIVE, "paid", context)


def _reactivated(
    subscription: Subscription, context: Context
) -> tuple[Subscription, tuple[Event, ...]]:
    active = subscriptions.reactivate(subscription, context.now)
    event = context.event(
        EventKind.SUBSCRIPTION_MOVED,
        before=str(subscription.status),
        after=str(active.status),
        why="paid",
        periods_not_billed=list(range(subscription.next_period, active.next_period)),
        next_billing_at=active.next_billing_at.isoformat() if active.next_billing_at else None,
    )
    return active, (event,)


def _move_subscription(
    subscription: Subscription, to: SubscriptionStatus, why: str, context: Context
) -> tuple[Subscription, tuple[Event, ...]]:
    moved = replace(subscription, status=subscriptions.move(subscription.status, to))
    event = context.event(
        EventKind.SUBSCRIPTION_MOVED, before=str(subscription.status), after=str(to), why=why
    )
    return moved, (event,)


# --- submitted, and not paid ----------------------------------------------------------------


def _undecided_or_unpaid(case: Case, finding: Finding, context: Context) -> Conclusion:
    match finding.verdict:
        case Verdict.DECLINED if case.attempt.origin is Origin.LINK:
            # A customer whose card was refused tries the next one, on the same page.
            return _unpaid_final(case, finding, context)
        case Verdict.DECLINED:
            return _declined(case, finding.reason, context)
        case Verdict.UNPAID_FINAL:
            return _unpaid_final(case, finding, context)
        case Verdict.CONTRADICTORY:
            return _held_as_unknown(_unpaid_no_longer(case), finding, context)
        case _:
            looked = context.event(EventKind.ATTEMPT_LOOKED, found=finding.reason)
            return Conclusion(_ask_again(_unpaid_no_longer(case), context), (looked,))


def _held_as_unknown(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Kept with its evidence and asked about again; a person is told once per new finding."""
    news = _quarantined(finding, context, alert=case.attempt.outcome != finding.reason)
    kept = replace(case, attempt=replace(case.attempt, outcome=finding.reason))
    return Conclusion(_ask_again(kept, context), (news,))


def _quarantined(finding: Finding, context: Context, *, alert: bool = True) -> Event:
    return context.event(EventKind.ATTEMPT_QUARANTINED, alert=alert, evidence=finding.reason)


def _unpaid_no_longer(case: Case) -> Case:
    # The gateway took its "final" back: the grace starts anew when it ends again.
    return replace(case, attempt=replace(case.attempt, unpaid_since=None))


def _declined(case: Case, resolution: str, context: Context) -> Conclusion:
    if case.attempt.origin is Origin.LINK:
        return _link_unpaid(case, AttemptStatus.DECLINED, resolution, context)
    attempt = _ended(case.attempt, AttemptStatus.DECLINED, resolution, context)
    said = context.event(
        EventKind.ATTEMPT_DECLINED, resolution=resolution, original_code=attempt.original_code
    )
    policy = policy_named(case.subscription.dunning_policy)
    declines = _declines(case, attempt)
    step = _after_decline(case, attempt, policy, declines, context)
    failed = _payment_failed(policy, declines, step, context)
    since = case.invoice.first_declined_at or context.now
    case = replace(case, invoice=replace(case.invoice, first_declined_at=since))
    return replace(
        _owed(case, attempt, step, (said, failed), context),
        kills_card=step.reason if step.kills_card else None,
        pauses_service=step.reason if step.pauses_service else None,
    )


def _declines(case: Case, attempt: Attempt) -> list[Declined]:
    """Of the invoice, oldest first, the newest being this attempt's."""
    tries = [a for a in case.earlier if a.status is AttemptStatus.DECLINED and a.id != attempt.id]
    tries.sort(key=lambda earlier: earlier.number)
    return [Declined(a.origin, a.settled_at or a.created_at, a.outcome) for a in (*tries, attempt)]


def _after_decline(
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
    )
    status = case.subscription.status
    if status is SubscriptionStatus.CANCELLED:
        return replace(step, at=None, turn=Turn.PERSON, rule="subscription.cancelled")
    if status is SubscriptionStatus.SUSPENDED and step.turn is Turn.OURS:
        # Somebody asked for this attempt; the clock asks for no other.
        return replace(step, at=None, turn=Turn.NOBODY, rule="subscription.suspended")
    return step


def _payment_failed(
    policy: Policy, declines: list[Declined], step: NextStep, context: Context
) -> Event:
    """The notice that a payment failed, never without what follows (pains: mails that hid it)."""
    resolution = declines[-1].resolution
    return context.event(
        EventKind.PAYMENT_FAILED,
        attempt=1 + steps_used(declines),
        of=policy.attempts,
        resolution=resolution,
        because=decline_for(resolution).reason,
        follows=str(step.turn),
        next_attempt_at=step.at.isoformat() if step.at else None,
        waits_until=step.gives_up_at.isoformat() if step.gives_up_at else None,
        consequence=str(policy.end),
        policy=policy.name,
        rule=step.rule,
    )


def _unpaid_final(case: Case, finding: Finding, context: Context) -> Conclusion:
    attempt = case.attempt
    since = attempt.unpaid_since or context.now
    over = since + context.terms.expiry_grace
    if attempt.unpaid_since is None or context.now < over:
        waiting = replace(attempt, unpaid_since=since, look_at=over)
        said = context.event(
            EventKind.ATTEMPT_UNPAID_FINAL, status=finding.reason, grace_ends=over.isoformat()
        )
        return Conclusion(replace(case, attempt=waiting), (said,))
    if finding.verdict is Verdict.DECLINED:
        return _declined(case, finding.reason, context)
    if attempt.sale_status == "process_failed":
        # The card was asked and refused; only the invoice ended by its clock.
        return _declined(case, attempt.sale_resolution or finding.reason, context)
    return _not_charged(case, finding.reason, hold_it=finding.reason != "expired", context=context)


def _not_charged(case: Case, reason: str, *, hold_it: bool, context: Context) -> Conclusion:
    if case.attempt.origin is Origin.LINK:
        return _link_unpaid(case, AttemptStatus.NOT_CHARGED, reason, context, alert=hold_it)
    attempt = _ended(case.attempt, AttemptStatus.NOT_CHARGED, reason, context)
    # Only what was armed counts: a switched-off night of prepared attempts is nobody's failure.
    count = case.invoice.not_charged_count + (attempt.submitted_at is not None)
    step = (
        hold(f"not_charged: {reason}", "not_charged.hold")
        if hold_it
        else after_not_charged(context.now, count, context.terms)
    )
    said = context.event(EventKind.ATTEMPT_NOT_CHARGED, reason=reason, alert=step.at is None)
    case = replace(case, invoice=replace(case.invoice, not_charged_count=count))
    return _owed(case, attempt, step, (said,), context)


def _link_unpaid(
    case: Case, status: AttemptStatus, outcome: str, context: Context, *, alert: bool = False
) -> Conclusion:
    """A page that nobody paid on is no failed charge: the next step that the invoice had before,
    and kept while the page held the slot, stands as it was.
    """
    attempt = _ended(case.attempt, status, outcome, context)
    declined = status is AttemptStatus.DECLINED
    kind = EventKind.ATTEMPT_DECLINED if declined else EventKind.ATTEMPT_NOT_CHARGED
    said = context.event(kind, reason=outcome, alert=alert)
    invoice = case.invoice
    if invoice.status is not InvoiceStatus.OPEN:
        return Conclusion(replace(case, attempt=attempt), (said,))
    at = invoice.next_attempt_at
    if at is None and invoice.reason is None:
        invoice = replace(invoice, reason="link_not_paid")
    freed = context.event(
        EventKind.INVOICE_WAITING,
        reason=invoice.reason,
        rule="link.unpaid",
        next_attempt_at=at.isoformat() if at else None,
    )
    invoice = replace(invoice, ring_at=at)
    return Conclusion(replace(case, attempt=attempt, invoice=invoice), (said, freed))


def _ended(attempt: Attempt, status: AttemptStatus, outcome: str, context: Context) -> Attempt:
    asks = attempt.gateway_id is not None  # An invoice that never existed cannot turn out paid.
    return replace(
        attempt,
        status=attempts.move(attempt.status, status),
        outcome=outcome,
        settled_at=context.now,
        lease_until=None,
        look_at=context.now + RECHECKS[0] if asks else None,
    )


def withdrawn(attempt: Attempt, reason: str, now: datetime) -> Attempt:
    """A prepared attempt that a pause or a cancellation overtook. Nothing was sent, for sure: the
    caller holds the locks without which it cannot be submitted.
    """
    return replace(
        attempt,
        status=attempts.move(attempt.status, AttemptStatus.NOT_CHARGED),
        outcome=reason,
        settled_at=now,
        lease_until=None,
    )


def _owed(
    case: Case, attempt: Attempt, step: NextStep, said: tuple[Event, ...], context: Context
) -> Conclusion:
    """The invoice stays owed (if it still is) and waits for its next step."""
    if case.invoice.status is not InvoiceStatus.OPEN:
        return Conclusion(replace(case, attempt=attempt), said[:1])
    invoice = replace(
        case.invoice,
        reason=step.reason,
        next_attempt_at=step.at,
        ring_at=step.at,
        next_origin=step.origin or attempt.origin,
        give_up_at=_patience(case, step, context),
    )
    waiting = context.event(
        EventKind.INVOICE_WAITING,
        reason=step.reason,
        rule=step.rule,
        next_attempt_at=step.at.isoformat() if step.at else None,
        alert=step.turn is Turn.PERSON,
    )
    subscription = case.subscription
    moved: tuple[Event, ...] = ()
    if subscription.status is SubscriptionStatus.ACTIVE:
        subscription, moved = _move_subscription(
            subscription, SubscriptionStatus.PAST_DUE, step.reason, context
        )
    events = [*said, waiting, *moved, *_asked_of_the_customer(invoice, step, context)]
    if step.turn is Turn.NOBODY:
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
    until = invoice.give_up_at.isoformat() if invoice.give_up_at else None
    return [context.event(kinds[step.turn], reason=step.reason, rule=step.rule, until=until)]


def give_up(
    invoice: Invoice, subscription: Subscription, rule: str, context: Context
) -> tuple[Invoice, Subscription, list[Event]]:
    """End the recovery of an open invoice as its policy says. Late money still pays it."""
    policy = policy_named(subscription.dunning_policy)
    stays = policy.end is End.LEAVE_OPEN
    invoice = replace(
        invoice,
        status=invoice.status if stays else invoices.move(invoice.status, _UNCOLLECTIBLE),
        reason=f"recovery_ended: {invoice.reason}",
        next_attempt_at=None,
        ring_at=None,
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
    subscription, moved = _move_subscription(subscription, target, rule, context)
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
"""Only these move: one that was paused, cancelled or has ended meanwhile keeps its state."""


# --- asking again ---------------------------------------------------------------------------


def _ask_again(case: Case, context: Context) -> Case:
    attempt = case.attempt
    if attempt.status is AttemptStatus.SUBMITTED:
        attempt = replace(attempt, look_at=context.now + _wait_before_next_look(attempt, context))
    elif attempt.look_at is not None:  # a recheck that brought no answer
        attempt = replace(attempt, look_at=context.now + LONGEST_EAGER_WAIT)
    return replace(case, attempt=attempt)


def _wait_before_next_look(attempt: Attempt, context: Context) -> timedelta:
    """A quarter of the attempt's age, so that young ones are asked often and old ones rarely."""
    age = context.now - (attempt.submitted_at or attempt.created_at)
    if age > EAGER_LOOKS_FOR:
        return PATIENT_WAIT
    return min(max(age / 4, context.terms.reconcile_after), LONGEST_EAGER_WAIT)


def _rechecked(case: Case, finding: Finding, context: Context) -> Conclusion:
    """A settled attempt was asked about again and is still not paid."""
    attempt = case.attempt
    done = attempt.rechecks + 1
    ended = attempt.settled_at or attempt.created_at
    # By the clock and not by the count: a callback brings looks of its own.
    following = next((ended + after for after in RECHECKS if ended + after > context.now), None)
    case = replace(case, attempt=replace(attempt, rechecks=done, look_at=following))
    unpaid = finding.verdict in {Verdict.DECLINED, Verdict.UNPAID_FINAL}
    if unpaid or (_was_never_sold(attempt) and finding.reason in UNSOLD_STATUSES):
        looked = context.event(EventKind.ATTEMPT_LOOKED, found=finding.reason, recheck=done)
        return Conclusion(case, (looked,))
    # Undecided again: asked about until it is final once more, however long that takes.
    case = replace(case, attempt=replace(case.attempt, look_at=context.now + PATIENT_WAIT))
    return _reopened(case, finding, context)


def _was_never_sold(attempt: Attempt) -> bool:
    """Then its invoice at the gateway is pending until it expires, which means nothing."""
    return attempt.submitted_at is None or attempt.sale_status == NOT_SENT


def _reopened(case: Case, finding: Finding, context: Context) -> Conclusion:
    """A "final" that is pending again may still become money: nothing else may be tried."""
    said = context.event(EventKind.ATTEMPT_CONTRADICTED, alert=True, evidence=finding.reason)
    if case.invoice.status is not InvoiceStatus.OPEN:
        return Conclusion(case, (said,))
    step = hold(f"earlier attempt reopened: {finding.reason}", "recheck.reopened")
    return _owed(case, case.attempt, step, (said,), context)


def _contradicted(case: Case, finding: Finding, context: Context) -> Conclusion:
    """We know it was paid; the gateway now says otherwise. A person decides, not a poll."""
    said = context.event(EventKind.ATTEMPT_CONTRADICTED, alert=True, evidence=finding.reason)
    return Conclusion(_asked_for_the_last_time(case), (said,))


# --- prepared: nothing was sold --------------------------------------------------------------


def _unsold(case: Case, statement: Statement, finding: Finding, context: Context) -> Conclusion:
    return _nothing_sent(
        case,
        NothingSent(
            finding.reason,
            hold=finding.verdict in {Verdict.CONTRADICTORY, Verdict.PENDING},
            statement=statement,
        ),
        context,
    )


def _nothing_sent(case: Case, news: NothingSent, context: Context) -> Conclusion:
    if case.attempt.status not in attempts.LIVE:
        return Conclusion(case, ())  # It slept so long that others have ended the attempt.
    if news.statement is not None:
        case = _with_gateway_id(case, news.statement)
    case = replace(case, attempt=replace(case.attempt, sale_status=NOT_SENT))
    concluded = _not_charged(case, news.reason, hold_it=news.hold, context=context)
    if not news.hold or news.statement is None:
        return concluded
    evidence = Finding(Verdict.CONTRADICTORY, news.reason)
    return replace(concluded, events=(_quarantined(evidence, context), *concluded.events))


def _never_handed_out(case: Case, context: Context) -> Conclusion:
    attempt = case.attempt
    lapsed = attempt.lease_until is not None and attempt.lease_until <= context.now
    if attempt.status is not AttemptStatus.PREPARED or not lapsed:
        return Conclusion(case, ())
    return _link_unpaid(case, AttemptStatus.NOT_CHARGED, "never handed out", context)


def _forbidden(case: Case, news: Forbidden, context: Context) -> Conclusion:
    """The step is not used up, and it was no failure of the wire: the rule names the next date."""
    if case.attempt.status is not AttemptStatus.PREPARED:
        return Conclusion(case, ())
    attempt = _ended(case.attempt, AttemptStatus.NOT_CHARGED, news.reason, context)
    again = news.again_at.isoformat() if news.again_at else None
    said = context.event(EventKind.ATTEMPT_FORBIDDEN, rule=news.rule, again_at=again)
    step = after_refusal(news.rule, news.reason, news.again_at)
    return _owed(case, attempt, step, (said,), context)


def _postponed(case: Case, reason: str, context: Context) -> Conclusion:
    attempt = case.attempt
    if attempt.status is not AttemptStatus.PREPARED:
        return Conclusion(case, ())
    if case.invoice.status is not InvoiceStatus.OPEN or case.invoice.next_attempt_at is None:
        # Paid or held meanwhile: to come back to it would ring for nothing, for ever.
        ended = _ended(attempt, AttemptStatus.NOT_CHARGED, reason, context)
        said = context.event(EventKind.ATTEMPT_NOT_CHARGED, reason=reason)
        return Conclusion(replace(case, attempt=ended), (said,))
    age = context.now - attempt.created_at
    again = context.now + min(max(age / 4, context.terms.reconcile_after), LONGEST_EAGER_WAIT)
    attempt = replace(attempt, lease_until=again, claims=0)
    invoice = replace(case.invoice, ring_at=again, reason=reason)
    said = context.event(EventKind.ATTEMPT_POSTPONED, reason=reason, again=again.isoformat())
    return Conclusion(replace(case, attempt=attempt, invoice=invoice), (said,))
