"""Applies the decision of a named person about an attempt that the gateway leaves undecided.

    --paid      like a payment stated by the gateway: succeeded, or surplus if nothing is owed
    --not-paid  the attempt ends as not charged; the invoice waits for that person's next order

The gateway is still polled, and its later statement wins. A payment after `--not-paid` pays the
invoice, or is surplus. A refusal after `--paid` alerts a person and changes nothing: the customer
is not debited again unless the person withdraws the decision.
"""

from __future__ import annotations

from dataclasses import replace

from billing_worker.domain import attempt as attempts
from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Attempt, AttemptStatus
from billing_worker.domain.declines import DeclineClass, classify
from billing_worker.domain.dunning import hold
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.outcome.attempt_changes import PATIENT_WAIT, end_attempt
from billing_worker.domain.outcome.attempt_result import Case, Conclusion, Context, Resolved
from billing_worker.domain.outcome.next_step import stays_owed
from billing_worker.domain.outcome.paid import pay
from billing_worker.domain.statement import Finding, Verdict

PAID_BY_WORD = "paid, as a person states"
NOT_PAID_BY_WORD = "not paid, as a person states"


def is_unknown(attempt: Attempt) -> bool:
    """Whether the attempt may have been paid and the gateway leaves it undecided."""
    if attempt.status is AttemptStatus.SUBMITTED or attempt.undecided_since is not None:
        return True
    unlisted = attempt.status is AttemptStatus.DECLINED and attempt.resolved_at is None
    return unlisted and classify(attempt.outcome) is DeclineClass.UNKNOWN


def is_overruled(attempt: Attempt, finding: Finding) -> bool:
    """Whether a person's decision stands, because the gateway states nothing new since then."""
    if attempt.resolved_at is None:
        return False
    known = finding.verdict is Verdict.CONTRADICTORY and finding.reason == attempt.resolved_over
    return known or finding.verdict is Verdict.PENDING


def still_undecided(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Poll on until the gateway decides, however long that takes."""
    polled = context.event(EventKind.ATTEMPT_POLLED, found=finding.reason)
    asked = replace(case.attempt, next_poll_at=context.now + PATIENT_WAIT)
    return Conclusion(replace(case, attempt=asked), (polled,))


def may_be_resolved(attempt: Attempt, *, paid: bool) -> bool:
    """Whether a person may decide: the attempt is unknown, or an earlier decision of a person about
    it is changed before the gateway has confirmed it.
    """
    if is_unknown(attempt):
        return True
    if attempt.resolved_at is None:
        return False
    only_by_word = attempt.outcome == PAID_BY_WORD
    return attempt.status not in attempts.PAID if paid else only_by_word


def is_resolved(attempt: Attempt, *, paid: bool) -> bool:
    """Whether the same decision has been made already."""
    if attempt.resolved_at is None or attempt.undecided_since is not None:
        return False
    return (attempt.status in attempts.PAID) is paid


def resolve(case: Case, news: Resolved, context: Context) -> Conclusion:
    """Apply the decision. Where a person may not decide, nothing changes."""
    if not may_be_resolved(case.attempt, paid=news.paid):
        return Conclusion(case, ())
    if news.paid:
        return _paid(case, news, context)
    if case.attempt.status in attempts.PAID:
        return _taken_back(case, news, context)
    return _not_paid(case, news, context)


def _paid(case: Case, news: Resolved, context: Context) -> Conclusion:
    said = _said(case, news, context)
    concluded = pay(case, Finding(Verdict.PAID, PAID_BY_WORD), context)
    if concluded.case.attempt.status is AttemptStatus.SUCCEEDED:
        concluded = _quietly(concluded)
    return _by_word(concluded, said, news, context)


def _not_paid(case: Case, news: Resolved, context: Context) -> Conclusion:
    said = _said(case, news, context)
    attempt = case.attempt
    if attempt.status is AttemptStatus.SUBMITTED:
        attempt = end_attempt(attempt, AttemptStatus.NOT_CHARGED, NOT_PAID_BY_WORD, context)
    elif _another_goes_on(case):
        kept = replace(attempt, undecided_since=None)
        return _by_word(Conclusion(replace(case, attempt=kept), ()), said, news, context)
    return _by_word(_waits(case, attempt, context), said, news, context)


def _taken_back(case: Case, news: Resolved, context: Context) -> Conclusion:
    """Withdraw the decision "paid": the invoice is owed again and waits for the person's order."""
    said = _said(case, news, context)
    surplus = case.attempt.status is AttemptStatus.SURPLUS
    # TRANSITIONS has no such change: the gateway's own "paid" must never be withdrawn like this.
    attempt = replace(case.attempt, status=AttemptStatus.NOT_CHARGED, outcome=NOT_PAID_BY_WORD)
    if not surplus and case.invoice.status is InvoiceStatus.PAID:
        case = replace(case, invoice=invoices.owed_after_all(case.invoice))
    return _by_word(_waits(case, attempt, context), said, news, context)


def _another_goes_on(case: Case) -> bool:
    """Whether another attempt of the invoice is live or has a date. It is not touched."""
    others = (other for other in case.earlier if other.id != case.attempt.id)
    return case.invoice.next_attempt_at is not None or any(
        other.status in attempts.LIVE for other in others
    )


def _waits(case: Case, attempt: Attempt, context: Context) -> Conclusion:
    """Let the invoice wait for the person's order. The gateway is polled before that attempt."""
    attempt = replace(attempt, undecided_since=None)
    step = hold(NOT_PAID_BY_WORD, "resolved.not_paid")
    return _quietly(stays_owed(case, attempt, step, (), context))


def _quietly(concluded: Conclusion) -> Conclusion:
    """Remove the alerts: the person has just decided it."""
    return replace(concluded, events=tuple(replace(e, alert=False) for e in concluded.events))


def _by_word(concluded: Conclusion, said: Event, news: Resolved, context: Context) -> Conclusion:
    """Record the decision and poll at once: if the gateway has decided by now, that wins."""
    attempt = replace(
        concluded.case.attempt,
        next_poll_at=context.now,
        resolved_at=context.now,
        resolved_over=news.over,
    )
    case = replace(concluded.case, attempt=attempt)
    return replace(concluded, case=case, events=(said, *concluded.events))


def _said(case: Case, news: Resolved, context: Context) -> Event:
    return context.event(
        EventKind.ATTEMPT_RESOLVED,
        paid=news.paid,
        evidence=news.evidence,
        why=news.why,
        reference_id=case.attempt.reference_id,
        before=str(case.attempt.status),
        gateway_said=news.over,
    )
