"""Applies news about an attempt that has ended."""

from __future__ import annotations

from dataclasses import replace

from billing_worker.domain.card import REMOVED
from billing_worker.domain.dunning import hold
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.outcome.attempt_changes import (
    PATIENT_WAIT,
    RECHECKS,
    asked_for_the_last_time,
    next_recheck,
)
from billing_worker.domain.outcome.attempt_result import Case, Conclusion, Context
from billing_worker.domain.outcome.distance import was_never_sold
from billing_worker.domain.outcome.next_step import stays_owed, why_never_again
from billing_worker.domain.statement import UNSOLD_STATUSES, Finding, Verdict


def recheck(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Apply a statement about an ended attempt that is still not paid."""
    attempt = case.attempt
    done = attempt.rechecks + 1
    since = attempt.unpaid_since
    if finding.verdict is Verdict.UNPAID_FINAL and since is None:
        since = context.now
    # Late money is counted from the later of both: the gateway's invoice may end long after the attempt.
    ended = max(filter(None, (attempt.settled_at or attempt.created_at, since)))
    following = next_recheck(ended, context.now)
    if following is None and attempt.undecided_since is not None:
        # A final status that has changed once is polled again after it is final again.
        following = context.now + RECHECKS[0]
    asked = replace(
        attempt, rechecks=done, next_poll_at=following, undecided_since=None, unpaid_since=since
    )
    case = replace(case, attempt=asked)
    unpaid = finding.verdict in {Verdict.DECLINED, Verdict.UNPAID_FINAL}
    if unpaid or (was_never_sold(attempt) and finding.reason in UNSOLD_STATUSES):
        polled = context.event(EventKind.ATTEMPT_POLLED, found=finding.reason, recheck=done)
        return Conclusion(case, (polled,), kills_card=_refused_for_good(case, finding, context))
    # Undecided again: polled until it is final again, however long that takes.
    undecided = replace(
        case.attempt,
        next_poll_at=context.now + PATIENT_WAIT,
        undecided_since=attempt.undecided_since or context.now,
        unpaid_since=None,  # the wait for late money restarts once it is final again
    )
    case = replace(case, attempt=undecided)
    return _reopened(case, finding, context)


def _refused_for_good(case: Case, finding: Finding, context: Context) -> str | None:
    """Return why the card is dead, if a hard decline becomes known only after the attempt's end."""
    refusal = finding.reason if finding.verdict is Verdict.DECLINED else finding.refusal
    if refusal is None or case.card is None:
        return None
    if case.card.unusable_reason not in {None, REMOVED}:
        return None
    return why_never_again(case, case.attempt, refusal, context)


def _reopened(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Hold the invoice: an attempt that was final and is undecided again may still be paid."""
    said = context.event(EventKind.ATTEMPT_CONTRADICTED, alert=True, evidence=finding.reason)
    if case.invoice.status is not InvoiceStatus.OPEN:
        return Conclusion(case, (said,))
    step = hold(f"earlier attempt reopened: {finding.reason}", "recheck.reopened")
    return stays_owed(case, case.attempt, step, (said,), context)


def contradict(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Alert a person: the gateway no longer states a payment that it stated before."""
    said = context.event(EventKind.ATTEMPT_CONTRADICTED, alert=True, evidence=finding.reason)
    return Conclusion(asked_for_the_last_time(case), (said,))
