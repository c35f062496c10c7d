"""Chooses the rules for a piece of news about an attempt."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from billing_worker.domain import attempt as attempts
from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import AttemptStatus
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.outcome.attempt_changes import ask_again, heard, sold_elsewhere
from billing_worker.domain.outcome.attempt_result import (
    Case,
    Conclusion,
    Context,
    Forbidden,
    NeverHandedOut,
    News,
    NoAnswer,
    NothingSent,
    Postponed,
    Resolved,
    Stated,
)
from billing_worker.domain.outcome.next_step import owes_no_longer
from billing_worker.domain.outcome.paid import pay
from billing_worker.domain.outcome.pay_link_unpaid import never_handed_out
from billing_worker.domain.outcome.recheck import contradict, recheck
from billing_worker.domain.outcome.resolved import is_overruled, resolve, still_undecided
from billing_worker.domain.outcome.unpaid import (
    forbid,
    nothing_sent,
    of_another_owner,
    postpone,
    undecided_or_unpaid,
    unsold,
)
from billing_worker.domain.statement import (
    PAID_STATUSES,
    Finding,
    Statement,
    Verdict,
    foreign,
    judge,
)
from billing_worker.domain.subscription import SubscriptionStatus


def conclude(case: Case, news: News, context: Context) -> Conclusion:
    """Apply one piece of news. Pure; raises IllegalTransition only for a bug of ours."""
    return _after_a_decision(case, _apply(case, news, context), context)


def _after_a_decision(before: Case, concluded: Conclusion, context: Context) -> Conclusion:
    """Carry out a decision that waited for the live attempt, once that has ended unpaid: a pause, a
    cancellation, or an order to void the invoice if it ends unpaid.
    """
    case = concluded.case
    just_ended = before.attempt.status in attempts.LIVE and case.attempt.status not in attempts.LIVE
    if not just_ended or case.invoice.status not in invoices.OWED:
        return concluded
    if before.invoice.void_if_unpaid:
        void = _voided(concluded, f"{invoices.VOIDED}it ended unpaid", context)
        return _owes_no_longer(void, context)
    if case.invoice.status is not InvoiceStatus.OPEN:
        return concluded
    if case.subscription.status is SubscriptionStatus.PAUSED:
        aside = replace(case, invoice=invoices.put_aside(case.invoice))
        return replace(concluded, case=aside)
    if case.subscription.status is SubscriptionStatus.CANCELLED:
        return _voided(concluded, invoices.CANCELLED, context)
    return concluded


def _owes_no_longer(void: Conclusion, context: Context) -> Conclusion:
    """Undo that the unpaid end made the subscription past due: the voided invoice is not owed."""
    case = void.case
    current, moved = owes_no_longer(case.subscription, context, owes_more=case.owes_more)
    case = replace(case, subscription=current)
    return replace(void, case=case, events=(*void.events, *moved))


def _voided(concluded: Conclusion, reason: str, context: Context) -> Conclusion:
    void = invoices.voided(concluded.case.invoice, reason)
    said = context.event(EventKind.INVOICE_VOIDED, reason=reason)
    case = replace(concluded.case, invoice=void)
    return replace(concluded, case=case, events=(*concluded.events, said))


def _apply(  # noqa: PLR0911, C901 - a case each
    case: Case, news: News, context: Context
) -> Conclusion:
    match news:
        case Stated(statement) if case.attempt.gateway_id not in {None, statement.gateway_id}:
            return _about_another_invoice(case, statement, context)
        case Stated(statement) if case.attempt.gateway_id is None and (
            whose := foreign(statement, case.expected)
        ):
            return of_another_owner(case, whose, context)
        case Stated(statement, asked_at) if _is_older_than_known(
            case, statement, asked_at, context.now
        ):
            said = context.event(EventKind.ATTEMPT_POLLED, found="older than what is known")
            return Conclusion(case, (said,))
        case Stated(statement, asked_at):
            return _stated(heard(case, statement, asked_at), news, context)
        case NothingSent():
            return nothing_sent(case, news, context)
        case Postponed():
            return postpone(case, news, context)
        case Forbidden():
            return forbid(case, news, context)
        case NoAnswer(reason):
            polled = context.event(EventKind.ATTEMPT_POLLED, found="no answer", reason=reason)
            return Conclusion(ask_again(case, context), (polled,))
        case NeverHandedOut():
            return never_handed_out(case, news, context)
        case Resolved():
            return resolve(case, news, context)


def _about_another_invoice(case: Case, statement: Statement, context: Context) -> Conclusion:
    """A repeated create left a second invoice with our reference. It proves nothing about ours."""
    evidence = f"{statement.gateway_id} is {statement.status}, ours is {case.attempt.gateway_id}"
    said = context.event(EventKind.ATTEMPT_QUARANTINED, alert=True, evidence=evidence)
    return Conclusion(case, (said,))


def _is_older_than_known(
    case: Case, statement: Statement, asked_at: datetime | None, now: datetime
) -> bool:
    """Whether a newer poll was applied first. A payment that is not known yet is never too old."""
    known = case.attempt.heard_at
    if asked_at is None or known is None or asked_at >= known:
        return False
    if known > now:  # Written by a clock that was ahead, so the order is unknown.
        return False
    return statement.status not in PAID_STATUSES or case.attempt.status in attempts.PAID


def _stated(case: Case, news: Stated, context: Context) -> Conclusion:  # noqa: PLR0911 - a case each
    attempt = case.attempt
    finding = judge(news.statement, case.expected)
    if finding.verdict is Verdict.PAID:
        return pay(case, finding, context)
    if is_overruled(attempt, finding):
        return still_undecided(case, finding, context)
    match attempt.status:
        case AttemptStatus.PREPARED if _was_sold(news, finding):
            case, sold = sold_elsewhere(case, context)
            declined = undecided_or_unpaid(case, finding, context)
            return replace(declined, events=(sold, *declined.events))
        case AttemptStatus.PREPARED:
            return unsold(case, news, finding, context)
        case AttemptStatus.SUBMITTED:
            return undecided_or_unpaid(case, finding, context)
        case AttemptStatus.DECLINED | AttemptStatus.NOT_CHARGED:
            return recheck(case, finding, context)
        case AttemptStatus.SUCCEEDED | AttemptStatus.SURPLUS:
            return contradict(case, finding, context)


def _was_sold(news: Stated, finding: Finding) -> bool:
    """Whether somebody else has sold a prepared attempt that the gateway states as ended unpaid.

    Only a sale ends with a decline or a refusal. Without one, `maybe_sold` decides: another book,
    or this database before a restore, may have sold it.
    """
    ended = finding.verdict in {Verdict.DECLINED, Verdict.UNPAID_FINAL}
    told = finding.verdict is Verdict.DECLINED or finding.refusal is not None
    return ended and (told or news.maybe_sold)
