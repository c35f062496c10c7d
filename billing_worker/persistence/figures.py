"""Figures for monitoring. Each query reads an index of rows that are not finished, never the whole
book.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, case, func, or_, select

from billing_worker.persistence.invoices import is_unknown
from billing_worker.persistence.schema.outgoing import outbox
from billing_worker.persistence.schema.tables import attempts, invoices, subscriptions


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many rows wait, and since when the oldest does. None: no row waits."""

    count: int
    since: datetime | None


def periods_to_open(connection: Connection, now: datetime) -> Waiting:
    """Return subscriptions whose next period has begun and has no invoice yet."""
    since = subscriptions.c.next_billing_at
    query = select(func.count(), func.min(since)).where(since.is_not(None), since <= now)
    return Waiting(*connection.execute(query).one())


def invoices_to_charge(connection: Connection, now: datetime) -> Waiting:
    """Return open invoices whose next attempt is due and has not begun."""
    since = invoices.c.next_attempt_at
    query = select(func.count(), func.min(since)).where(
        invoices.c.enqueue_at.is_not(None), invoices.c.status == "open", since <= now
    )
    return Waiting(*connection.execute(query).one())


@dataclass(frozen=True, slots=True)
class Unknown:
    """Attempts whose outcome is unknown: the card may have been charged."""

    count: int
    since: datetime | None
    minor: Mapping[str, int]
    """Minor units by currency."""


def unknown(connection: Connection) -> Unknown:
    since = func.min(func.coalesce(attempts.c.undecided_since, attempts.c.submitted_at))
    query = (
        select(
            attempts.c.currency,
            func.count().label("number"),
            func.sum(attempts.c.amount_minor).label("minor"),
            since.label("since"),
        )
        .where(
            attempts.c.next_poll_at.is_not(None),
            or_(attempts.c.status == "submitted", attempts.c.undecided_since.is_not(None)),
            is_unknown(),
        )
        .group_by(attempts.c.currency)
    )
    rows = connection.execute(query).all()
    oldest = [row.since for row in rows if row.since is not None]
    return Unknown(
        sum(row.number for row in rows),
        min(oldest, default=None),
        {row.currency: int(row.minor) for row in rows},
    )


def due_between(connection: Connection, after: datetime, until: datetime) -> dict[str, int]:
    """Return the minor units by currency of periods that begin in (after, until]."""
    begins, since = subscriptions.c.next_billing_at, subscriptions.c.new_amount_from
    price = case(
        (since <= begins, subscriptions.c.new_amount_minor), else_=subscriptions.c.amount_minor
    )
    query = (
        select(subscriptions.c.currency, func.sum(price).label("minor"))
        .where(
            subscriptions.c.next_billing_at.is_not(None),
            subscriptions.c.next_billing_at > after,
            subscriptions.c.next_billing_at <= until,
        )
        .group_by(subscriptions.c.currency)
    )
    return {row.currency: int(row.minor) for row in connection.execute(query)}


def oldest_untold(connection: Connection) -> datetime | None:
    """Return when the oldest public event without a number was written, or None."""
    oldest: datetime | None = connection.execute(select(func.min(outbox.c.at))).scalar()
    return oldest
