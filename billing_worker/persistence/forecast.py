"""Queries of the preview, and of its comparison with what happened. They read the book in
batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, func, or_, select, text

from billing_worker.domain.attempt import AttemptStatus
from billing_worker.persistence.claims import (
    OF_SUBSCRIPTION,
    DueInvoice,
    UnreadableInvoice,
    read_with_attempts,
)
from billing_worker.persistence.rows import TERMS
from billing_worker.persistence.schema.tables import (
    attempts,
    customers,
    events,
    invoices,
    subscriptions,
)

IN = 500
"""Most values in one IN list: a statement takes a limited number of parameters."""


def at_one_moment(connection: Connection) -> None:
    """Open a transaction in which all queries see one snapshot.

    Without it, an invoice that a sweep opens between two queries counts twice. SQLite does so by
    itself.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))


def customers_after(connection: Connection, after_id: int, limit: int) -> list[int]:
    """Return a batch of customer ids, in order."""
    query = select(customers.c.id).where(customers.c.id > after_id).order_by(customers.c.id)
    return list(connection.execute(query.limit(limit)).scalars())


_AGREED = [
    column
    for column in TERMS
    if column.name not in {"record_digest", "created_at", "trial_end", "paid_through"}
]
"""Reading unused dates takes a tenth of the time of a large book."""


def agreements_of(connection: Connection, customer_ids: Sequence[int]) -> Sequence[Row[Any]]:
    """Return all subscriptions of a whole batch of customers, one-off charges too."""
    if not customer_ids:
        return []
    query: Any = (
        select(
            *_AGREED,
            subscriptions.c.trial_end.is_not(None).label("had_trial"),
            customers.c.reference_id.label("customer_reference"),
        )
        .join(customers, customers.c.id == subscriptions.c.customer_id)
        .where(subscriptions.c.customer_id.between(customer_ids[0], customer_ids[-1]))
        .order_by(subscriptions.c.customer_id, subscriptions.c.next_billing_at, subscriptions.c.id)
    )
    rows: Sequence[Row[Any]] = connection.execute(query).all()
    return rows


@dataclass(frozen=True, slots=True)
class OpenInvoices:
    """The open invoices of one subscription, oldest first. Unreadable ones must not hide the
    others.
    """

    readable: list[DueInvoice]
    unreadable: list[UnreadableInvoice]


def open_invoices_of(
    connection: Connection, customer_ids: Sequence[int]
) -> dict[int, OpenInvoices]:
    """Return open invoices by subscription, due or not, with all their attempts so far."""
    if not customer_ids:
        return {}
    theirs = (
        subscriptions.c.customer_id.between(customer_ids[0], customer_ids[-1]),
        invoices.c.status == "open",
    )
    query = (
        select(invoices, *OF_SUBSCRIPTION)
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .where(*theirs)
        .order_by(invoices.c.subscription_id, invoices.c.period_number)
    )
    rows = connection.execute(query).all()
    tries: dict[int, list[Row[Any]]] = defaultdict(list)
    if rows:
        made = (
            select(*_TRIED)
            .join(invoices, invoices.c.id == attempts.c.invoice_id)
            .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
            .where(*theirs)
            .order_by(attempts.c.number)
        )
        for row in connection.execute(made):
            tries[row.invoice_id].append(row)
    found: dict[int, OpenInvoices] = defaultdict(lambda: OpenInvoices([], []))
    read, unreadable = read_with_attempts(rows, tries)
    for item in read:
        found[item.invoice.subscription_id].readable.append(item)
    for broken in unreadable:
        found[broken.subscription_id].unreadable.append(broken)
    return dict(found)


# Without the secrets: a preview does not need them.
_TRIED: list[Any] = [
    column for column in attempts.c if column.name not in {"bearer", "page", "page_digest"}
]


def _in_flight() -> Any:
    return (
        select(attempts.c.id)
        .where(attempts.c.invoice_id == invoices.c.id, attempts.c.status == AttemptStatus.SUBMITTED)
        .exists()
    )


# --- what became of it -----------------------------------------------------------------------


def invoices_named(connection: Connection, references: Sequence[str]) -> dict[str, Row[Any]]:
    query = select(invoices, _in_flight().label("in_flight")).where(
        invoices.c.reference_id.in_(references)
    )
    return {row.reference_id: row for row in connection.execute(query)}


def subscriptions_named(connection: Connection, references: Collection[str]) -> dict[str, Row[Any]]:
    query = select(*TERMS).where(subscriptions.c.reference_id.in_(references))
    return {row.reference_id: row for row in connection.execute(query)}


def paid_by(connection: Connection, invoice_ids: Collection[int]) -> dict[int, Row[Any]]:
    """Return by invoice the attempt that paid it, with the times of its creation and sale."""
    query: Any = select(
        attempts.c.id,
        attempts.c.invoice_id,
        attempts.c.reference_id,
        attempts.c.created_at,
        attempts.c.submitted_at,
    ).where(attempts.c.invoice_id.in_(invoice_ids), attempts.c.status == AttemptStatus.SUCCEEDED)
    return {row.invoice_id: row for row in connection.execute(query)}


def happened_to(
    connection: Connection, subscription_ids: Collection[int], since: datetime
) -> dict[int, list[Row[Any]]]:
    """Return events by subscription, oldest first, with those of its invoices. Key 0 holds events
    about no row.
    """
    query = (
        select(events)
        .where(
            events.c.at > since,
            or_(
                events.c.subscription_id.in_(subscription_ids),
                events.c.kind.startswith("sales."),
            ),
        )
        .order_by(events.c.id)
    )
    found: dict[int, list[Row[Any]]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.subscription_id or 0].append(row)
    return found


def paid_between(
    connection: Connection, after: datetime, until: datetime
) -> Iterator[Sequence[Row[Any]]]:
    """Yield batches of paid invoices with reference, kind and start of their subscription."""
    last_id = 0
    query = (
        select(
            invoices,
            subscriptions.c.kind,
            subscriptions.c.created_at.label("subscribed_at"),
        )
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .where(invoices.c.paid_at > after, invoices.c.paid_at <= until)
        .order_by(invoices.c.id)
        .limit(IN)
    )
    while page := connection.execute(query.where(invoices.c.id > last_id)).all():
        yield page
        last_id = page[-1].id


def count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(subscriptions)).scalar_one()
