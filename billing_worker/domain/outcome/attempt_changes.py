"""Changes of an attempt itself, and the date of its next poll."""

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
"""When an attempt that ended unpaid is polled again, counted from its end (gateway.md §11.8)."""

NEEDS_CUSTOMER = "needs_customer"
"""Stored as `sale_status` when the answer asks for a step that only the customer can take."""

EAGER_POLLS_FOR = timedelta(days=1)

LONGEST_EAGER_WAIT = timedelta(minutes=5)
"""Longest wait between polls on the first day: soon after a long outage everything is known."""

PATIENT_WAIT = timedelta(hours=1)


def heard(case: Case, statement: Statement, asked_at: datetime | None = None) -> Case:
    """Store what a statement tells about its attempt, whatever it proves about the money."""
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
    """End the attempt. `may_exist`: the gateway may have an invoice whose id we do not know."""
    return replace(
        attempt,
        status=attempts.move(attempt.status, status),
        outcome=outcome,
        settled_at=context.now,
        lease_until=None,
        next_poll_at=_first_recheck(attempt, context.now, may_exist=may_exist),
    )


def _first_recheck(attempt: Attempt, now: datetime, *, may_exist: bool) -> datetime | None:
    """Return the date of the first recheck, or None if the gateway has no invoice to be paid.

    A pay link is always rechecked: its create may have arrived without an answer, and the gateway
    may charge a known card when it creates the page.
    """
    may_exist = may_exist or attempt.gateway_id is not None or attempt.origin is Origin.LINK
    return now + RECHECKS[0] if may_exist else None


def next_recheck(ended: datetime, now: datetime) -> datetime | None:
    """Return the next date of RECHECKS. Time counts, not polls: a callback causes extra polls."""
    return next((ended + after for after in RECHECKS if ended + after > now), None)


def withdrawn(attempt: Attempt, reason: str, now: datetime) -> Attempt:
    """End a prepared attempt because of a pause or a cancellation.

    This database has sent no sale: the caller holds the locks that a submit needs. Another book, or
    the database before a restore, may have sent one: so the attempt is polled by its reference.
    """
    return replace(
        attempt,
        status=attempts.move(attempt.status, AttemptStatus.NOT_CHARGED),
        outcome=reason,
        settled_at=now,
        lease_until=None,
        next_poll_at=_first_recheck(attempt, now, may_exist=True),
    )


def sold_elsewhere(case: Case, context: Context) -> tuple[Case, Event]:
    """Mark a prepared attempt as submitted: it may have been charged, although we sent no sale.

    A copy of this database, or the database before a restore, has sold it; or the gateway has
    charged for a page that nobody was given.
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
        # The next step is kept in case the page ends unpaid, but is not enqueued meanwhile.
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
    elif attempt.next_poll_at is not None:  # a recheck without an answer
        wait = max(_wait_before_next_poll(attempt, context), LONGEST_EAGER_WAIT)
        attempt = replace(attempt, next_poll_at=context.now + wait)
    return replace(case, attempt=attempt)


def _is_held(attempt: Attempt, now: datetime) -> bool:
    """Whether a caller still holds the lease of a prepared pay link."""
    return attempt.lease_until is not None and attempt.lease_until > now


def _wait_before_next_poll(attempt: Attempt, context: Context) -> timedelta:
    """A quarter of the attempt's age: young attempts are polled often, old ones rarely."""
    age = context.now - (attempt.settled_at or attempt.submitted_at or attempt.created_at)
    if age > EAGER_POLLS_FOR:
        return PATIENT_WAIT
    return min(max(age / 4, context.timings.reconcile_after), LONGEST_EAGER_WAIT)


def asked_for_the_last_time(case: Case) -> Case:
    return replace(case, attempt=replace(case.attempt, next_poll_at=None))
