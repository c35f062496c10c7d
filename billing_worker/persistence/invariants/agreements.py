"""What was agreed: nothing is charged after a cancellation or in a pause, no period is lost, and a
state that ends something says who has ended it.
"""

from __future__ import annotations

from sqlalchemy import Exists, ScalarSelect, Text, and_, cast, func, or_, select

from billing_worker.domain.attempt import Origin
from billing_worker.domain.events import EventKind
from billing_worker.persistence.invariants.asking import Question, sliced
from billing_worker.persistence.schema.tables import attempts, events, invoices, subscriptions

_AUTOMATIC = (Origin.SCHEDULED, Origin.DUNNING, Origin.BACKUP)
"""A customer may still pay what a cancelled subscription owes, and a person may order it."""

_decisions = events.alias("decisions")
_before = cast(_decisions.c.data["before"].as_string(), Text)


def _last_decision(kind: EventKind, status: str) -> ScalarSelect[int]:
    """Return the id of the event by which it came into this status."""
    return (
        select(func.max(_decisions.c.id))
        .where(
            _decisions.c.subscription_id == subscriptions.c.id,
            _decisions.c.kind == kind,
            or_(_before.is_(None), _before != status),
        )
        .correlate(subscriptions)  # Two levels up: by itself it would ask about all of them.
        .scalar_subquery()
    )


def _submitted_after(kind: EventKind, status: str, *origins: Origin) -> Exists:
    """Whether this book has submitted a charge after the subscription came into the status.

    Ids are compared and no times: both lock the subscription, so ids are in order, and the clocks of
    two machines need not be.
    """
    sold_by = events.c.data["sold_by"].as_string()  # another book: found, not sent
    return (
        select(events.c.id)
        .join(attempts, attempts.c.id == events.c.attempt_id)
        .where(
            events.c.subscription_id == subscriptions.c.id,
            events.c.kind == EventKind.ATTEMPT_SUBMITTED,
            sold_by.is_(None),
            events.c.id > _last_decision(kind, status),
            attempts.c.origin.in_(origins or tuple(Origin)),
        )
        .correlate(subscriptions)
        .exists()
    )


CHARGED_AFTER_CANCELLATION = Question(
    sliced(
        subscriptions.c.id,
        subscriptions.c.reference_id,
        subscriptions.c.status == "cancelled",
        _submitted_after(EventKind.SUBSCRIPTION_CANCELLED, "cancelled", *_AUTOMATIC),
    ),
    by=subscriptions.c.id,
)

CHARGED_IN_PAUSE = Question(
    sliced(
        subscriptions.c.id,
        subscriptions.c.reference_id,
        subscriptions.c.status == "paused",
        _submitted_after(EventKind.SUBSCRIPTION_PAUSED, "paused"),
    ),
    by=subscriptions.c.id,
)

_SKIPPING = (
    EventKind.SUBSCRIPTION_RESUMED,
    EventKind.SUBSCRIPTION_CHANGED,
    EventKind.SUBSCRIPTION_MOVED,
    EventKind.SUBSCRIPTION_FORGIVEN,
    EventKind.SUBSCRIPTION_ARMED,
    EventKind.SUBSCRIPTION_TAKEN_BACK,
    EventKind.CATCH_UP_DECIDED,
)
"""Decisions by which periods move or are skipped."""

_previous = invoices.alias("previous")
_previous_number = (
    select(func.max(_previous.c.period_number))
    .where(
        _previous.c.subscription_id == invoices.c.subscription_id,
        _previous.c.period_number < invoices.c.period_number,
    )
    .correlate(invoices)
    .scalar_subquery()
)
_previous_end = (
    select(_previous.c.period_end)
    .where(
        _previous.c.subscription_id == invoices.c.subscription_id,
        _previous.c.period_number == invoices.c.period_number - 1,
    )
    .correlate(invoices)
    .scalar_subquery()
)
_MOVED = (
    select(events.c.id)
    .where(events.c.subscription_id == invoices.c.subscription_id, events.c.kind.in_(_SKIPPING))
    .correlate(invoices)
    .exists()
)
PERIOD_LOST = Question(
    sliced(
        invoices.c.id,
        invoices.c.reference_id,
        or_(
            _previous_number < invoices.c.period_number - 1,
            _previous_end != invoices.c.period_start,
        ),
        ~_MOVED,
    ),
    by=invoices.c.id,
)

_SAID = (
    select(events.c.id)
    .where(
        events.c.invoice_id == invoices.c.id,
        or_(
            and_(
                invoices.c.status == "void",
                events.c.kind.in_((EventKind.INVOICE_VOIDED, EventKind.CATCH_UP_DECIDED)),
            ),
            and_(invoices.c.status == "uncollectible", events.c.kind == EventKind.RECOVERY_ENDED),
        ),
    )
    .correlate(invoices)
    .exists()
)
GIVEN_UP_BY_NOBODY = Question(
    sliced(
        invoices.c.id,
        invoices.c.reference_id,
        invoices.c.status.in_(("void", "uncollectible")),
        ~_SAID,
    ),
    by=invoices.c.id,
)

_ENDED_BY = {
    "paused": EventKind.SUBSCRIPTION_PAUSED,
    "cancelled": EventKind.SUBSCRIPTION_CANCELLED,
    "suspended": EventKind.SUBSCRIPTION_SUSPENDED,
}
_SAID_OF_IT = (
    select(events.c.id)
    .where(
        events.c.subscription_id == subscriptions.c.id,
        or_(
            events.c.kind == EventKind.SUBSCRIPTION_MOVED,  # by the end of a recovery
            *(
                and_(subscriptions.c.status == status, events.c.kind == kind)
                for status, kind in _ENDED_BY.items()
            ),
        ),
    )
    .correlate(subscriptions)
    .exists()
)
STOPPED_BY_NOBODY = Question(
    sliced(
        subscriptions.c.id,
        subscriptions.c.reference_id,
        subscriptions.c.status.in_(tuple(_ENDED_BY)),
        subscriptions.c.from_book.is_(None),  # another book's history is there
        ~_SAID_OF_IT,
    ),
    by=subscriptions.c.id,
)
