"""A named person's word on an attempt that the gateway leaves undecided.

    --paid      as if the gateway had said so: succeeded, or surplus where nothing is owed any more
    --not-paid  the attempt ends as not charged; the invoice waits for that person's next order

The gateway goes on being asked, and its later word wins. Money that comes after `--not-paid` pays
the invoice, or is surplus. A "no" after `--paid` alerts a person and changes nothing: nobody is
debited again for it unless the person takes their word back.
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
    """Whether money may have moved, and the gateway does not decide it."""
    if attempt.status is AttemptStatus.SUBMITTED or attempt.undecided_since is not None:
        return True
    unlisted = attempt.status is AttemptStatus.DECLINED and attempt.resolved_at is None
    return unlisted and classify(attempt.outcome) is DeclineClass.UNKNOWN


def is_overruled(attempt: Attempt, finding: Finding) -> bool:
    """Whether the gateway still says what the person knew who resolved the attempt."""
    if attempt.resolved_at is None:
        return False
    known = finding.verdict is Verdict.CONTRADICTORY and finding.reason == attempt.resolved_over
    return known or finding.verdict is Verdict.PENDING


def still_undecided(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Asked about until the gateway decides, however long that takes."""
    polled = context.event(EventKind.ATTEMPT_POLLED, found=finding.reason)
    asked = replace(case.attempt, next_poll_at=context.now + PATIENT_WAIT)
    return Conclusion(replace(case, attempt=asked), (polled,))


def may_be_resolved(attempt: Attempt, *, paid: bool) -> bool:
    """An unknown one may; and a person may take their own word back, as long as the gateway has not
    said so too.
    """
    if is_unknown(attempt):
        return True
    if attempt.resolved_at is None:
        return False
    only_by_word = attempt.outcome == PAID_BY_WORD
    return attempt.status not in attempts.PAID if paid else only_by_word


def is_resolved(attempt: Attempt, *, paid: bool) -> bool:
    """Whether this very word stands already."""
    if attempt.resolved_at is None or attempt.undecided_since is not None:
        return False
    return (attempt.status in attempts.PAID) is paid


def resolve(case: Case, news: Resolved, context: Context) -> Conclusion:
    """Apply the word, or change nothing where it is not for a person to say."""
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
    """The person was wrong: what they called paid is owed again, and waits for their next order."""
    said = _said(case, news, context)
    surplus = case.attempt.status is AttemptStatus.SURPLUS
    # No edge of the table: the gateway's own "paid" must never be taken back like this.
    attempt = replace(case.attempt, status=AttemptStatus.NOT_CHARGED, outcome=NOT_PAID_BY_WORD)
    if not surplus and case.invoice.status is InvoiceStatus.PAID:
        case = replace(case, invoice=invoices.owed_after_all(case.invoice))
    return _by_word(_waits(case, attempt, context), said, news, context)


def _another_goes_on(case: Case) -> bool:
    """A later attempt of the invoice is under way, or its date is set: that one is not touched."""
    others = (other for other in case.earlier if other.id != case.attempt.id)
    return case.invoice.next_attempt_at is not None or any(
        other.status in attempts.LIVE for other in others
    )


def _waits(case: Case, attempt: Attempt, context: Context) -> Conclusion:
    """No attempt follows by itself: the person orders it, and the gateway is asked right before."""
    attempt = replace(attempt, undecided_since=None)
    step = hold(NOT_PAID_BY_WORD, "resolved.not_paid")
    return _quietly(stays_owed(case, attempt, step, (), context))


def _quietly(concluded: Conclusion) -> Conclusion:
    """Whoever has just decided need not be alerted about it."""
    return replace(concluded, events=tuple(replace(e, alert=False) for e in concluded.events))


def _by_word(concluded: Conclusion, said: Event, news: Resolved, context: Context) -> Conclusion:
    """The gateway is asked again at once: should it decide by now, its word wins."""
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
