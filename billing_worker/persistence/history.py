"""The append-only history. Each entry is written in the transaction of the change that it
describes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, Subquery, bindparam, case, func, select, text

from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.public_events import told_by
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.bulk import insert_many
from billing_worker.persistence.outbox import pending
from billing_worker.persistence.schema.tables import attempts, events, invoices


@dataclass(frozen=True, slots=True)
class Entry:
    """An event and the rows that it describes."""

    event: Event
    subscription_id: int | None = None
    invoice_id: int | None = None
    attempt_id: int | None = None

    @classmethod
    def of_invoice(cls, invoice: Invoice, event: Event) -> Entry:
        return cls(event, invoice.subscription_id, invoice.id)

    @classmethod
    def about(cls, key: CaseKey, event: Event) -> Entry:
        """An event about an attempt, and so about its invoice and subscription."""
        return cls(event, key.subscription_id, key.invoice_id, key.attempt_id)


def write(connection: Connection, entries: Iterable[Entry]) -> None:
    """Also what other systems are told of it: whatever is in the history is told, or neither is."""
    entries = list(entries)
    rows = [
        {
            "at": entry.event.at,
            "kind": entry.event.kind,
            "by": entry.event.by,
            "alert": entry.event.alert,
            "subscription_id": entry.subscription_id,
            "invoice_id": entry.invoice_id,
            "attempt_id": entry.attempt_id,
            "data": dict(entry.event.data),
        }
        for entry in entries
    ]
    insert_many(connection, events, rows)
    pending.add(
        connection,
        [
            (told, entry.subscription_id, entry.invoice_id)
            for entry in entries
            for told in told_by(entry.event)
        ],
    )


def of_invoice(connection: Connection, invoice_id: int) -> Sequence[Row[Any]]:
    """Return all events about one invoice, oldest first, with the attempt's number if there
    is one.
    """
    query = (
        select(events, attempts.c.number.label("attempt_number"))
        .join(attempts, attempts.c.id == events.c.attempt_id, isouter=True)
        .where(events.c.invoice_id == invoice_id)
        .order_by(events.c.id)
    )
    return connection.execute(query).all()


def told_of(
    connection: Connection, invoice_id: int, attempt_id: int, kinds: Iterable[str]
) -> Sequence[Row[Any]]:
    """Return events of these kinds about one attempt, newest first."""
    query: Select[Any] = (
        select(events.c.kind, events.c.by, events.c.data)
        .where(
            events.c.invoice_id == invoice_id,
            events.c.attempt_id == attempt_id,
            events.c.kind.in_(sorted(kinds)),
        )
        .order_by(events.c.id.desc())
    )
    return connection.execute(query).all()


def of_subscription(connection: Connection, subscription_id: int) -> Sequence[Row[Any]]:
    """Return events about the subscription itself, oldest first, without those of its invoices."""
    query = (
        select(events)
        .where(events.c.subscription_id == subscription_id, events.c.invoice_id.is_(None))
        .order_by(events.c.id)
    )
    return connection.execute(query).all()


def all_about(connection: Connection, subscription_id: int) -> Sequence[Row[Any]]:
    """Return events about the subscription and its invoices, oldest first, with the references of
    invoice and attempt.
    """
    query = (
        select(
            events,
            invoices.c.reference_id.label("invoice_reference"),
            attempts.c.reference_id.label("attempt_reference"),
            attempts.c.origin,
        )
        .join(invoices, invoices.c.id == events.c.invoice_id, isouter=True)
        .join(attempts, attempts.c.id == events.c.attempt_id, isouter=True)
        .where(events.c.subscription_id == subscription_id)
        .order_by(events.c.id)
    )
    return connection.execute(query).all()


def of_the_book(connection: Connection, kinds: Collection[EventKind]) -> Sequence[Row[Any]]:
    """Return events of these kinds that are about no subscription, oldest first."""
    query = (
        select(events)
        .where(
            # The index on subscriptions narrows the search to the few events without one.
            events.c.subscription_id.is_(None),
            events.c.kind.in_(sorted(kinds)),
        )
        .order_by(events.c.id)
    )
    return connection.execute(query).all()


def of_kinds(
    connection: Connection, subscription_id: int, kinds: Collection[EventKind]
) -> Sequence[Row[Any]]:
    """Return events of these kinds about the subscription itself, oldest first."""
    query = (
        select(events)
        .where(
            events.c.subscription_id == subscription_id,
            events.c.invoice_id.is_(None),
            events.c.kind.in_(sorted(kinds)),
        )
        .order_by(events.c.id)
    )
    return connection.execute(query).all()


@dataclass(frozen=True, slots=True)
class Last:
    """The newest event about an attempt, and whether it ever had an event of the given kind."""

    kind: str
    at: datetime
    data: dict[str, Any]
    was_said: bool


def _last_ids() -> Subquery:
    was_said = case((events.c.kind == bindparam("said"), 1), else_=0)
    return (
        select(func.max(events.c.id).label("id"), func.max(was_said).label("was_said"))
        .where(
            events.c.invoice_id.in_(bindparam("invoice_ids", expanding=True)),
            events.c.attempt_id.in_(bindparam("attempt_ids", expanding=True)),
        )
        .group_by(events.c.attempt_id)
        .subquery()
    )


_LAST_IDS = _last_ids()
_LAST = select(events, _LAST_IDS.c.was_said).join(_LAST_IDS, _LAST_IDS.c.id == events.c.id)


def last_of(
    connection: Connection, attempts: Sequence[tuple[int, int]], said: str
) -> dict[int, Last]:
    """Return the last events by attempt id. `attempts` are (invoice id, attempt id), because the
    index is on invoices.
    """
    asked = {
        "said": said,
        "invoice_ids": [invoice_id for invoice_id, _ in attempts],
        "attempt_ids": [attempt_id for _, attempt_id in attempts],
    }
    return {
        row.attempt_id: Last(row.kind, row.at, row.data, bool(row.was_said))
        for row in connection.execute(_LAST, asked)
    }


def of_card_setup(connection: Connection, reference_id: str) -> Sequence[Row[Any]]:
    """Return events about a card set-up that pays no invoice, oldest first."""
    query = (
        select(events)
        .where(
            # The index on subscriptions narrows the search to the few events without one.
            events.c.subscription_id.is_(None),
            events.c.invoice_id.is_(None),
            events.c.data["reference_id"].as_string() == reference_id,
        )
        .order_by(events.c.id)
    )
    return connection.execute(query).all()


def alerts(connection: Connection, limit: int) -> Sequence[Row[Any]]:
    """Return the newest alerts."""
    query = (
        select(events, invoices.c.reference_id.label("invoice_reference"))
        .join(invoices, invoices.c.id == events.c.invoice_id, isouter=True)
        .where(text("events.alert"))  # literally the condition of the index `ix_events_alerts`
        .order_by(events.c.id.desc())
        .limit(limit)
    )
    return connection.execute(query).all()
