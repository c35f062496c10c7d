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
from billing_worker.domain.attempt import Attempt, AttemptStatus
from billing_worker.domain.dunning import NextStep, after_decline, after_not_charged, hold
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.evidence import Expected, Finding, Statement, Verdict, judge
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.domain.terms import Terms

RECHECKS = (timedelta(hours=1), timedelta(days=1), timedelta(days=3))
"""When a final, unpaid attempt is asked about again, counted from its end (gateway.md §11.8)."""

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
class NoAnswer:
    """Asking, or selling, brought no usable answer. Proves nothing."""

    reason: str


News = Stated | NothingSent | Postponed | NoAnswer


# --- what is decided ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """An attempt with the invoice and the subscription that it belongs to."""

    attempt: Attempt
    invoice: Invoice
    subscription: Subscription


@dataclass(frozen=True, slots=True)
class Conclusion:
    case: Case
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Context:
    now: datetime
    by: str  # who brings the news: "charge", "reconcile", "operator:ann" …
    terms: Terms

    def event(self, kind: EventKind, *, alert: bool = False, **data: object) -> Event:
        return Event(kind, self.now, self.by, data, alert)


def conclude(case: Case, news: News, context: Context) -> Conclusion:
    """Apply one piece of news. Pure; raises IllegalTransition only for a bug of ours."""
    match news:
        case Stated(statement):
            return _stated(_with_gateway_id(case, statement), statement, context)
        case NothingSent():
            return _nothing_sent(case, news, context)
        case Postponed(reason):
            return _postponed(case, reason, context)
        case NoAnswer(reason):
            looked = context.event(EventKind.ATTEMPT_LOOKED, found="no answer", reason=reason)
            return Conclusion(_ask_again(case, context), (looked,))


def _with_gateway_id(case: Case, statement: Statement) -> Case:
    if case.attempt.gateway_id is not None:
        return case
    return replace(case, attempt=replace(case.attempt, gateway_id=statement.gateway_id))


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
        paid_at=context.now,
    )
    paid = context.event(EventKind.INVOICE_PAID, amount=str(invoice.money))
    subscription, moved = _current_again(case.subscription, context)
    return Conclusion(Case(attempt, invoice, subscription), (said, paid, *moved))


def _sold_by_a_twin(case: Case) -> Case:
    """A copy of this database, or its life before a restore, has sold what we only prepared."""
    submitted = attempts.move(case.attempt.status, AttemptStatus.SUBMITTED)
    return replace(case, attempt=replace(case.attempt, status=submitted))


def _asked_for_the_last_time(case: Case) -> Case:
    return replace(case, attempt=replace(case.attempt, look_at=None))


def _current_again(
    subscription: Subscription, context: Context
) -> tuple[Subscription, tuple[Event, ...]]:
    if subscription.status is not SubscriptionStatus.PAST_DUE:
        return subscription, ()
    return _move_subscription(subscription, SubscriptionStatus.ACTIVE, "paid", context)


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
    attempt = _ended(case.attempt, AttemptStatus.DECLINED, resolution, context)
    said = context.event(EventKind.ATTEMPT_DECLINED, resolution=resolution)
    return _owed(case, attempt, after_decline(resolution), (said,), context)


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
    if attempt.sale_status == "process_failed":
        # The card was asked and refused; only the invoice ended by its clock.
        return _declined(case, attempt.sale_resolution or finding.reason, context)
    return _not_charged(case, finding.reason, hold_it=finding.reason != "expired", context=context)


def _not_charged(case: Case, reason: str, *, hold_it: bool, context: Context) -> Conclusion:
    attempt = _ended(case.attempt, AttemptStatus.NOT_CHARGED, reason, context)
    count = case.invoice.not_charged_count + 1
    step = (
        hold(f"not_charged: {reason}", "not_charged.hold")
        if hold_it
        else after_not_charged(context.now, count, context.terms)
    )
    said = context.event(EventKind.ATTEMPT_NOT_CHARGED, reason=reason, alert=step.at is None)
    case = replace(case, invoice=replace(case.invoice, not_charged_count=count))
    return _owed(case, attempt, step, (said,), context)


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


def _owed(
    case: Case, attempt: Attempt, step: NextStep, said: tuple[Event, ...], context: Context
) -> Conclusion:
    """The invoice stays owed (if it still is) and waits for its next step."""
    if case.invoice.status is not InvoiceStatus.OPEN:
        return Conclusion(replace(case, attempt=attempt), said)
    invoice = replace(case.invoice, reason=step.reason, next_attempt_at=step.at, ring_at=step.at)
    waiting = context.event(
        EventKind.INVOICE_WAITING,
        reason=step.reason,
        rule=step.rule,
        next_attempt_at=step.at.isoformat() if step.at else None,
    )
    subscription = case.subscription
    moved: tuple[Event, ...] = ()
    if subscription.status is SubscriptionStatus.ACTIVE:
        subscription, moved = _move_subscription(
            subscription, SubscriptionStatus.PAST_DUE, step.reason, context
        )
    return Conclusion(Case(attempt, invoice, subscription), (*said, waiting, *moved))


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
    following = ended + RECHECKS[done] if done < len(RECHECKS) else None
    case = replace(case, attempt=replace(attempt, rechecks=done, look_at=following))
    if finding.verdict in {Verdict.DECLINED, Verdict.UNPAID_FINAL}:
        looked = context.event(EventKind.ATTEMPT_LOOKED, found=finding.reason, recheck=done)
        return Conclusion(case, (looked,))
    return _reopened(case, finding, context)


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
    concluded = _not_charged(case, news.reason, hold_it=news.hold, context=context)
    if not news.hold or news.statement is None:
        return concluded
    evidence = Finding(Verdict.CONTRADICTORY, news.reason)
    return replace(concluded, events=(_quarantined(evidence, context), *concluded.events))


def _postponed(case: Case, reason: str, context: Context) -> Conclusion:
    attempt = case.attempt
    if attempt.status is not AttemptStatus.PREPARED:
        return Conclusion(case, ())
    age = context.now - attempt.created_at
    again = context.now + min(max(age / 4, context.terms.reconcile_after), LONGEST_EAGER_WAIT)
    attempt = replace(attempt, lease_until=again, claims=0)
    invoice = replace(case.invoice, ring_at=again, reason=reason)
    said = context.event(EventKind.ATTEMPT_POSTPONED, reason=reason, again=again.isoformat())
    return Conclusion(replace(case, attempt=attempt, invoice=invoice), (said,))
