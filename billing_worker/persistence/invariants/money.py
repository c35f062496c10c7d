"""What was charged: once, in full, for what is owed, with evidence. Attempts and invoices are compared
with one another and with the history.
"""

from __future__ import annotations

from sqlalchemy import Exists, and_, func, or_, select

from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import PAID_ELSEWHERE
from billing_worker.persistence.invariants.asking import Question, sliced
from billing_worker.persistence.schema.tables import attempts, book, events, invoices

_EQUAL_PAYMENTS = (
    select(func.count())
    .where(
        attempts.c.invoice_id == invoices.c.id,
        attempts.c.status == "succeeded",
        attempts.c.amount_minor == invoices.c.amount_minor,
        attempts.c.currency == invoices.c.currency,
    )
    .scalar_subquery()
)
_PAYMENTS = (
    select(func.count())
    .where(attempts.c.invoice_id == invoices.c.id, attempts.c.status == "succeeded")
    .scalar_subquery()
)
PAID_BY_NOTHING = Question(
    sliced(
        invoices.c.id,
        invoices.c.reference_id,
        invoices.c.status == "paid",
        or_(
            and_(
                func.coalesce(invoices.c.reason, "").not_like(f"{PAID_ELSEWHERE}%"),
                _EQUAL_PAYMENTS != 1,
            ),
            _PAYMENTS > 1,
        ),
    ),
    by=invoices.c.id,
)

PAYS_NOTHING = Question(
    sliced(
        attempts.c.id,
        attempts.c.reference_id,
        attempts.c.status == "succeeded",
        attempts.c.invoice_id == invoices.c.id,
        invoices.c.status != "paid",
    ),
    by=attempts.c.id,
)


def _told_of(*kinds: EventKind) -> Exists:
    """Whether the history has such an event about the attempt. The index is on invoices."""
    return (
        select(events.c.id)
        .where(
            events.c.invoice_id == attempts.c.invoice_id,
            events.c.attempt_id == attempts.c.id,
            events.c.kind.in_(kinds),
        )
        .exists()
    )


SUCCESS_WITHOUT_EVIDENCE = Question(
    sliced(
        attempts.c.id,
        attempts.c.reference_id,
        attempts.c.status == "succeeded",
        ~_told_of(EventKind.ATTEMPT_SUCCEEDED, EventKind.ATTEMPT_RESOLVED),
    ),
    by=attempts.c.id,
)

_SUBMITTED = (
    select(func.count())
    .where(
        events.c.invoice_id == attempts.c.invoice_id,
        events.c.attempt_id == attempts.c.id,
        events.c.kind == EventKind.ATTEMPT_SUBMITTED,
    )
    .scalar_subquery()
)
SUBMITTED_TWICE = Question(
    sliced(attempts.c.id, attempts.c.reference_id, _SUBMITTED > 1),
    by=attempts.c.id,
)

SURPLUS_UNTOLD = Question(
    sliced(
        attempts.c.id,
        attempts.c.reference_id,
        attempts.c.status == "surplus",
        ~_told_of(EventKind.ATTEMPT_SURPLUS),
    ),
    by=attempts.c.id,
)

MODE_OF_ANOTHER = Question(
    sliced(
        attempts.c.id,
        attempts.c.reference_id,
        attempts.c.submitted_at.is_not(None),  # before the first charge the book has no mode
        attempts.c.test_mode != book.c.test_mode,
    ),
    by=attempts.c.id,
)
