"""What waits, and for whom: nothing is forgotten. Each question reads an index of unfinished rows."""

from __future__ import annotations

from sqlalchemy import String, cast, func, select, text

from billing_worker.persistence.invariants.asking import BEFORE, Question, sliced, whole
from billing_worker.persistence.schema.outgoing import outbox
from billing_worker.persistence.schema.tables import attempts, invoices, subscriptions

# Literally the condition of the index `uq_attempts_one_live`: with bound values SQLite does not use it.
_LIVE = text("attempts.status IN ('prepared', 'submitted')")

DUE_PERIODS = Question(
    whole(
        subscriptions.c.id,
        subscriptions.c.reference_id,
        subscriptions.c.next_billing_at.is_not(None),
        subscriptions.c.next_billing_at <= BEFORE,
        subscriptions.c.trouble.is_(None),  # told of when it was found
    )
)

DUE_INVOICES = Question(
    whole(
        invoices.c.id,
        invoices.c.reference_id,
        invoices.c.enqueue_at.is_not(None),
        invoices.c.enqueue_at <= BEFORE,
    )
)

DUE_POLLS = Question(
    whole(
        attempts.c.id,
        attempts.c.reference_id,
        attempts.c.next_poll_at.is_not(None),
        attempts.c.next_poll_at <= BEFORE,
    )
)

NEVER_POLLED = Question(
    whole(
        attempts.c.id,
        attempts.c.reference_id,
        _LIVE,
        attempts.c.status == "submitted",
        attempts.c.next_poll_at.is_(None),
    )
)

NEVER_CONTINUED = Question(
    whole(
        attempts.c.id,
        attempts.c.reference_id,
        _LIVE,
        attempts.c.status == "prepared",
        attempts.c.next_poll_at.is_(None),
        attempts.c.invoice_id == invoices.c.id,
        invoices.c.enqueue_at.is_(None),
        invoices.c.reason.is_(None),  # otherwise somebody is waited for
    )
)

_SEVERAL = (
    select(attempts.c.invoice_id)
    .where(_LIVE)
    .group_by(attempts.c.invoice_id)
    .having(func.count() > 1)
)
SEVERAL_LIVE = Question(
    whole(invoices.c.id, invoices.c.reference_id, invoices.c.id.in_(_SEVERAL)),
)

_HAS_LIVE_ATTEMPT = (
    select(attempts.c.id).where(_LIVE, attempts.c.invoice_id == invoices.c.id).exists()
)
OPEN_WITHOUT_STEP = Question(
    sliced(
        invoices.c.id,
        invoices.c.reference_id,
        invoices.c.status == "open",
        # A date that no sweep will see is none.
        invoices.c.enqueue_at.is_(None),
        invoices.c.reason.is_(None) | invoices.c.next_attempt_at.is_not(None),
        ~_HAS_LIVE_ATTEMPT,
    ),
    by=invoices.c.id,
)

ARMED_WITHOUT_DATE = Question(
    sliced(
        subscriptions.c.id,
        subscriptions.c.reference_id,
        subscriptions.c.status.in_(("trialing", "active", "past_due")),
        subscriptions.c.next_billing_at.is_(None),
        ~subscriptions.c.held,
        subscriptions.c.handed_over_at.is_(None),
    ),
    by=subscriptions.c.id,
)

_OLDEST_UNTOLD = select(func.min(outbox.c.id)).where(outbox.c.trouble.is_(None)).scalar_subquery()
UNTOLD = Question(
    whole(
        outbox.c.id, cast(outbox.c.id, String), outbox.c.id == _OLDEST_UNTOLD, outbox.c.at <= BEFORE
    )
)
