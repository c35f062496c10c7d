"""Applies news of a charge that is undecided or has ended unpaid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from billing_worker.domain import attempt as attempts
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.declines import DeclineClass, classify
from billing_worker.domain.dunning import (
    NextStep,
    after_expired,
    after_not_charged,
    after_refusal,
    hold,
    policy_named,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.outcome.attempt_changes import (
    EAGER_POLLS_FOR,
    LONGEST_EAGER_WAIT,
    NEEDS_CUSTOMER,
    PATIENT_WAIT,
    ask_again,
    end_attempt,
    heard,
    sold_elsewhere,
)
from billing_worker.domain.outcome.attempt_result import (
    Case,
    Conclusion,
    Context,
    Forbidden,
    NothingSent,
    Postponed,
    Stated,
)
from billing_worker.domain.outcome.distance import NOT_SENT, ended_unproven
from billing_worker.domain.outcome.next_step import (
    declines_of,
    next_step,
    payment_failed,
    stays_owed,
)
from billing_worker.domain.outcome.pay_link_unpaid import link_unpaid
from billing_worker.domain.statement import (
    MODERATION,
    UNPAID_FINAL_STATUSES,
    UNSOLD_STATUSES,
    Finding,
    Statement,
    Verdict,
    page_may_be_paid,
)


def undecided_or_unpaid(case: Case, finding: Finding, context: Context) -> Conclusion:
    match finding.verdict:
        case Verdict.DECLINED if case.attempt.origin is Origin.LINK:
            # The customer may try another card on the same page.
            return _unpaid_final(case, finding, context)
        case Verdict.DECLINED if case.undecided_equal is not None:
            # It is called a duplicate, perhaps of that one: as unknown as that one is.
            found = f"{finding.reason}, while {case.undecided_equal} is undecided"
            polled = context.event(EventKind.ATTEMPT_POLLED, found=found)
            return Conclusion(ask_again(_unpaid_no_longer(case), context), (polled,))
        case Verdict.DECLINED:
            return decline(case, finding.reason, context)
        case Verdict.UNPAID_FINAL:
            return _unpaid_final(case, finding, context)
        case Verdict.CONTRADICTORY:
            return _held_as_unknown(_unpaid_no_longer(case), finding, context)
        case _:
            return _pending(_unpaid_no_longer(case), finding, context)


def _pending(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Poll again. Moderation ends only when a person at the gateway acts: it alerts once, at once."""
    attempt = case.attempt
    moderated = finding.reason if finding.reason.endswith(MODERATION) else None
    polled = context.event(
        EventKind.ATTEMPT_POLLED,
        found=finding.reason,
        alert=moderated is not None and attempt.outcome != moderated,
    )
    was_moderated = (attempt.outcome or "").endswith(MODERATION)
    if moderated or was_moderated:
        case = replace(case, attempt=replace(attempt, outcome=moderated))
    return Conclusion(ask_again(case, context), (polled,))


def _held_as_unknown(case: Case, finding: Finding, context: Context) -> Conclusion:
    """Store the evidence and poll again. A person is alerted once per new finding."""
    news = _quarantined(finding, context, alert=case.attempt.outcome != finding.reason)
    kept = replace(case, attempt=replace(case.attempt, outcome=finding.reason))
    return Conclusion(ask_again(kept, context), (news,))


def _quarantined(finding: Finding, context: Context, *, alert: bool = True) -> Event:
    return context.event(EventKind.ATTEMPT_QUARANTINED, alert=alert, evidence=finding.reason)


def _unpaid_no_longer(case: Case) -> Case:
    # The status is no longer final. The grace starts again with the next final status.
    return replace(case, attempt=replace(case.attempt, unpaid_since=None))


def _unpaid_final(case: Case, finding: Finding, context: Context) -> Conclusion:
    attempt = case.attempt
    since = attempt.unpaid_since or context.now
    over = since + context.timings.expiry_grace
    if attempt.unpaid_since is None or context.now < over:
        waiting = replace(attempt, unpaid_since=since, next_poll_at=over)
        said = context.event(
            EventKind.ATTEMPT_UNPAID_FINAL,
            status=finding.reason,
            resolution=finding.refusal,
            grace_ends=over,
        )
        return Conclusion(replace(case, attempt=waiting), (said,))
    if finding.verdict is Verdict.DECLINED:
        # On an ended attempt `unpaid_since` means "expired", for which the next step waits longer.
        return decline(_unpaid_no_longer(case), finding.reason, context)
    if finding.refusal is not None:
        return decline(case, finding.refusal, context)
    by_its_clock = finding.reason == "expired"
    if by_its_clock and (refused := _refused_by_the_sale(attempt)):
        return decline(case, refused, context)
    return _not_charged(case, finding.reason, hold_it=not by_its_clock, context=context)


def _refused_by_the_sale(attempt: Attempt) -> str | None:
    """Return the refusal in the answer to the sale, for an invoice that has only expired."""
    said = attempt.sale_resolution
    if attempt.sale_status == NEEDS_CUSTOMER:
        # No customer was present for the step, and another sale would ask for it again.
        return said if said and classify(said) is DeclineClass.NEEDS_CUSTOMER else _3DS_REQUIRED
    return (said or "expired") if attempt.sale_status == "process_failed" else None


_3DS_REQUIRED = "auth_3ds_required"


def decline(case: Case, resolution: str, context: Context) -> Conclusion:
    if case.attempt.origin is Origin.LINK:
        return link_unpaid(case, AttemptStatus.DECLINED, resolution, context)
    attempt = end_attempt(case.attempt, AttemptStatus.DECLINED, resolution, context)
    equal: dict[str, Any] = {"equal_charge": case.equal_charge} if case.equal_charge else {}
    said = context.event(
        EventKind.ATTEMPT_DECLINED,
        resolution=resolution,
        original_code=attempt.original_code,
        **equal,
    )
    policy = policy_named(case.subscription.dunning_policy)
    declines = declines_of(case, attempt)
    step = next_step(case, attempt, policy, declines, context)
    failed = payment_failed(policy, declines, step, context)
    since = case.invoice.first_declined_at or context.now
    case = replace(case, invoice=replace(case.invoice, first_declined_at=since))
    return replace(
        stays_owed(case, attempt, step, (said, failed), context),
        kills_card=step.reason if step.kills_card else None,
        pauses_service=step.reason if step.pauses_service else None,
    )


def _not_charged(case: Case, reason: str, *, hold_it: bool, context: Context) -> Conclusion:
    if case.attempt.origin is Origin.LINK:
        return link_unpaid(case, AttemptStatus.NOT_CHARGED, reason, context, alert=hold_it)
    attempt = end_attempt(case.attempt, AttemptStatus.NOT_CHARGED, reason, context)
    # Only submitted attempts count: a prepared one may have met nothing but the kill switch.
    count = case.invoice.not_charged_count + (attempt.submitted_at is not None)
    if hold_it:
        step = hold(f"not_charged: {reason}", "not_charged.hold")
    elif ended_unproven(attempt):
        step = _after_expired(case, attempt, context)
    else:
        step = after_not_charged(context.now, count, context.timings)
    said = context.event(EventKind.ATTEMPT_NOT_CHARGED, reason=reason, alert=hold_it)
    case = replace(case, invoice=replace(case.invoice, not_charged_count=count))
    return stays_owed(case, attempt, step, (said,), context)


MADE_BY_SOMEBODY = "an invoice that no create of this book has made: it may have been sold"


def _after_expired(case: Case, attempt: Attempt, context: Context) -> NextStep:
    again = any(ended_unproven(one) for one in case.earlier if one.id != attempt.id)
    return after_expired(attempt.unpaid_since or context.now, context.timings, again=again)


def unsold(case: Case, news: Stated, finding: Finding, context: Context) -> Conclusion:
    """Apply a statement about a prepared attempt that is neither paid nor declined."""
    if news.maybe_sold and finding.verdict is Verdict.PENDING:
        return sold_by_somebody(case, MADE_BY_SOMEBODY, context)
    return nothing_sent(
        case,
        NothingSent(
            finding.reason,
            hold=finding.verdict in {Verdict.CONTRADICTORY, Verdict.PENDING},
            statement=news.statement,
        ),
        context,
    )


def nothing_sent(case: Case, news: NothingSent, context: Context) -> Conclusion:
    if case.attempt.status not in attempts.LIVE:
        return Conclusion(case, ())  # Another process has ended the attempt meanwhile.
    if news.statement is not None:
        case = heard(case, news.statement)
        if _may_have_been_sold(case.attempt, news.statement):
            return sold_by_somebody(case, news.reason, context)
    case = replace(case, attempt=replace(case.attempt, sale_status=NOT_SENT))
    concluded = _not_charged(case, news.reason, hold_it=news.hold, context=context)
    if not news.hold or news.statement is None:
        return concluded
    evidence = Finding(Verdict.CONTRADICTORY, news.reason)
    return replace(concluded, events=(_quarantined(evidence, context), *concluded.events))


def of_another_owner(case: Case, whose: str, context: Context) -> Conclusion:
    """Handle an invoice that has our reference but belongs to another book or customer.

    Whatever its status, its id is not stored, and a person is alerted.
    """
    if case.attempt.status is AttemptStatus.PREPARED:
        return nothing_sent(case, NothingSent(whose, hold=True), context)
    return Conclusion(case, (_quarantined(Finding(Verdict.CONTRADICTORY, whose), context),))


def _may_have_been_sold(attempt: Attempt, statement: Statement) -> bool:
    """Whether the gateway's invoice of a prepared attempt may have been sold by somebody else.

    An invoice that has ended is no sign of that: every unsold invoice expires.
    """
    if attempt.status is not AttemptStatus.PREPARED or attempt.gateway_id != statement.gateway_id:
        return False
    if attempt.origin is Origin.LINK:
        return page_may_be_paid(statement)
    return statement.status not in UNSOLD_STATUSES | UNPAID_FINAL_STATUSES


def sold_by_somebody(case: Case, reason: str, context: Context) -> Conclusion:
    """Treat the attempt as unknown: no other attempt starts before the gateway states its end."""
    case, sold = sold_elsewhere(case, context)
    held = _held_as_unknown(case, Finding(Verdict.CONTRADICTORY, reason), context)
    return replace(held, events=(sold, *held.events))


def forbid(case: Case, news: Forbidden, context: Context) -> Conclusion:
    """End a forbidden attempt. It uses up no step of the ladder; the rule sets the next date."""
    if case.attempt.status is not AttemptStatus.PREPARED:
        return Conclusion(case, ())
    attempt = end_attempt(case.attempt, AttemptStatus.NOT_CHARGED, news.reason, context)
    said = context.event(EventKind.ATTEMPT_FORBIDDEN, rule=news.rule, again_at=news.again_at)
    step = after_refusal(news.rule, news.reason, news.again_at)
    return stays_owed(case, attempt, step, (said,), context)


def postpone(case: Case, news: Postponed, context: Context) -> Conclusion:
    attempt, reason = case.attempt, news.reason
    if attempt.status is not AttemptStatus.PREPARED:
        return Conclusion(case, ())
    if case.invoice.status is not InvoiceStatus.OPEN or case.invoice.next_attempt_at is None:
        # Paid or held meanwhile: to continue later would enqueue it in vain, for ever.
        ended = end_attempt(attempt, AttemptStatus.NOT_CHARGED, reason, context, may_exist=True)
        said = context.event(EventKind.ATTEMPT_NOT_CHARGED, reason=reason)
        return Conclusion(replace(case, attempt=ended), (said,))
    age = context.now - attempt.created_at
    wait = min(max(age / 4, context.timings.reconcile_after), LONGEST_EAGER_WAIT)
    if news.until_it_ends and age > EAGER_POLLS_FOR:
        wait = PATIENT_WAIT
    again = context.now + wait
    maybe_sold = attempt.maybe_sold or news.maybe_sold  # until the gateway has decided
    attempt = replace(attempt, lease_until=again, claims=0, maybe_sold=maybe_sold)
    invoice = replace(case.invoice, enqueue_at=again, reason=reason)
    said = context.event(EventKind.ATTEMPT_POSTPONED, reason=reason, again=again)
    return Conclusion(replace(case, attempt=attempt, invoice=invoice), (said,))
