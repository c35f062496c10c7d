from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update

from billing_worker.domain.errors import InvariantBroken
from billing_worker.domain.subscription import Subscription
from billing_worker.persistence.rows import subscription_from
from billing_worker.persistence.tables import cards, customers, subscriptions


def claim_due(connection: Connection, now: datetime, limit: int) -> list[Subscription]:
    """Lock up to `limit` subscriptions that are due, passing over those another sweep holds."""
    query = (
        select(subscriptions)
        .where(subscriptions.c.next_billing_at <= now)
        .order_by(subscriptions.c.next_billing_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [subscription_from(row) for row in connection.execute(query)]


_ADVANCE = (
    update(subscriptions)
    .where(
        subscriptions.c.id == bindparam("row_id"),
        subscriptions.c.next_period == bindparam("old_next_period"),
    )
    .values(
        status=bindparam("new_status"),
        next_period=bindparam("new_next_period"),
        next_billing_at=bindparam("new_next_billing_at"),
    )
)


def advance(connection: Connection, moves: Sequence[tuple[Subscription, Subscription]]) -> None:
    """Write (before, after) pairs of subscriptions whose next period was opened."""
    if not moves:
        return
    result = connection.execute(
        _ADVANCE,
        [
            {
                "row_id": before.id,
                "old_next_period": before.next_period,
                "new_status": after.status,
                "new_next_period": after.next_period,
                "new_next_billing_at": after.next_billing_at,
            }
            for before, after in moves
        ],
    )
    if result.rowcount != len(moves):
        raise InvariantBroken("a subscription moved while its row was locked")


def find(connection: Connection, reference_id: str) -> Row[Any] | None:
    """One subscription with its customer and card, or None."""
    query = _overview().where(subscriptions.c.reference_id == reference_id)
    return connection.execute(query).one_or_none()


def listed(connection: Connection, after_id: int, limit: int) -> Sequence[Row[Any]]:
    """A page in the order of creation; `after_id` is the last id of the page before, or 0."""
    query = (
        _overview().where(subscriptions.c.id > after_id).order_by(subscriptions.c.id).limit(limit)
    )
    return connection.execute(query).all()


def _overview() -> Any:
    return (
        select(
            subscriptions,
            customers.c.reference_id.label("customer_reference"),
            customers.c.name.label("customer_name"),
            customers.c.email.label("customer_email"),
            cards.c.mask.label("card_mask"),
            cards.c.brand.label("card_brand"),
        )
        .join(customers, customers.c.id == subscriptions.c.customer_id)
        .join(cards, cards.c.id == subscriptions.c.card_id, isouter=True)
    )


def count_by_status(connection: Connection) -> dict[str, int]:
    query = select(subscriptions.c.status, func.count()).group_by(subscriptions.c.status)
    return {status: count for status, count in connection.execute(query)}  # noqa: C416 - Row is no pair for dict()


def earliest_due(connection: Connection) -> datetime | None:
    return connection.execute(select(func.min(subscriptions.c.next_billing_at))).scalar()


def digests(connection: Connection, references: Sequence[str]) -> dict[str, str]:
    """Known reference ids with the digest of the record that made them."""
    query = select(subscriptions.c.reference_id, subscriptions.c.record_digest).where(
        subscriptions.c.reference_id.in_(references)
    )
    return {row.reference_id: row.record_digest for row in connection.execute(query)}


def add(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Insert subscriptions; the ids come back in the order of `rows`."""
    result = connection.execute(
        insert(subscriptions).returning(subscriptions.c.id, sort_by_parameter_order=True),
        list(rows),
    )
    return list(result.scalars())
