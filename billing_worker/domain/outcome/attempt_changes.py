"""How an attempt itself moves, and when the gateway is asked about it next."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from billing_worker.domain import attempt as attempts
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.outcome.attempt_result import Case, Context
from billing_worker.domain.statement import DECLINED_STATUSES, Statement, foreign

RECHECKS = (
    timedelta(hours=1),
    timedelta(days=1),
    timedelta(days=3),
    timedelta(days=7),
    timedelta(days=30),
)
"""When a final, unpaid attempt is asked about again, counted from its end (gateway.md §11.8)."""

NEEDS_CUSTOMER = "needs_customer"
"""Kept as the sale's status when its answer asks for a step that only the customer can take."""

EAGER_POLLS_FOR = timedelta(days=1)

LONGEST_EAGER_WAIT = timedelta(minutes=5)
"""An outage of hours must not stretch the wait: 10 minutes after it heals everything is known."""

PATIENT_WAIT = timedelta(hours=1)


def heard(case: Case, statement: Statement, asked_at: datetime | None = None) -> Case:
    """Keep what every statement tells of its attempt, whatever it proves about the money."""
    attempt = replace(case.attempt, heard_at=asked_at or case.attempt.heard_at)
    # The answer to our own create may leave the reference out.
    named = statement.reference_id in {None, attempt.reference_id}
    if attempt.gateway_id is None and named and foreign(statement, case.expected) is None:
        attempt = replace(attempt, gateway_id=statement.gateway_id)
    if statement.status in DECLINED_STATUSES and statement.original_code is not None:
        attempt = replace(attempt, original_code=statement.original_code)
    return replace(case, attempt=attempt)


def end_attempt(
    attempt: Attempt,
    status: AttemptStatus,
    outcome: str,
    context: Context,
    *,
    may_exist: bool = False,
) -> Attempt:
    """`may_exist`: the gateway may have an invoice for it, although we know of no id."""
    return replace(
        attempt,
        status=attempts.move(attempt.status, status),
        outcome=outcome,
        settled_at=context.now,
        lease_until=None,
        next_poll_at=_first_recheck(attempt, context.now, may_exist=may_exist),
    )


def _first_recheck(attempt: Attempt, now: datetime, *, may_exist: bool) -> datetime | None:
    """An invoice that never existed cannot turn out paid. A page may: the gateway may charge for
    it as it is created, and its create may have arrived although nobody has told us.
    """
    may_exist = may_exist or attempt.gateway_id is not None or attempt.origin is Origin.LINK
    return now + RECHECKS[0] if may_exist else None


def next_recheck(ended: datetime, now: datetime) -> datetime | None:
    """By the clock and not by the count: a callback brings looks of its own."""
    return next((ended + after for after in RECHECKS if ended + after > now), None)


def withdrawn(attempt: Attempt, reason: str, now: datetime) -> Attempt:
    """A prepared attempt that a pause or a cancellation overtook. These books have sent no sale, for
    sure: the caller holds the locks without which it cannot be submitted. A life that they have
    forgotten, or another book, may have sent one: it is asked about by its reference.
    """
    return replace(
        attempt,
        status=attempts.move(attempt.status, AttemptStatus.NOT_CHARGED),
        outcome=reason,
        settled_at=now,
        lease_until=None,
        next_poll_at=_first_recheck(attempt, now, may_exist=True),
    )


def sold_by_a_twin(case: Case, context: Context) -> tuple[Case, Event]:
    """A copy of this database, or its life before a restore, has sold what we only prepared; or the
    gateway has charged for a page that was given to nobody.

    It counts as submitted from now on, as if we had sold it: it may have been charged.
    """
    submitted = replace(
        case.attempt,
        status=attempts.move(case.attempt.status, AttemptStatus.SUBMITTED),
        submitted_at=context.now,
        lease_until=None,
    )
    said = context.event(
        EventKind.ATTEMPT_SUBMITTED, gateway_id=submitted.gateway_id, sold_by="somebody else"
    )
    invoice = case.invoice
    if submitted.origin is Origin.LINK:
        # Its next step is kept for when nobody pays; nobody is rung for it meanwhile.
        invoice = replace(invoice, enqueue_at=None)
    elif invoice.status is InvoiceStatus.OPEN:
        invoice = replace(invoice, reason=None, next_attempt_at=None, enqueue_at=None)
    return replace(case, attempt=submitted, invoice=invoice), said


def ask_again(case: Case, context: Context) -> Case:
    attempt = case.attempt
    if attempt.status is AttemptStatus.SUBMITTED:
        attempt = replace(
            attempt, next_poll_at=context.now + _wait_before_next_poll(attempt, context)
        )
    elif _is_held(attempt, context.now):
        attempt = replace(attempt, next_poll_at=attempt.lease_until)
    elif attempt.next_poll_at is not None:  # a recheck that brought no answer
        attempt = replace(attempt, next_poll_at=context.now + LONGEST_EAGER_WAIT)
    return replace(case, attempt=attempt)


def _is_held(attempt: Attempt, now: datetime) -> bool:
    """A prepared link whose caller, or the next one, may still go on with it."""
    return attempt.lease_until is not None and attempt.lease_until > now


def _wait_before_next_poll(attempt: Attempt, context: Context) -> timedelta:
    """A quarter of the attempt's age, so that young ones are asked often and old ones rarely."""
    age = context.now - (attempt.submitted_at or attempt.created_at)
    if age > EAGER_POLLS_FOR:
        return PATIENT_WAIT
    return min(max(age / 4, context.timings.reconcile_after), LONGEST_EAGER_WAIT)


def asked_for_the_last_time(case: Case) -> Case:
    return replace(case, attempt=replace(case.attempt, next_poll_at=None))
