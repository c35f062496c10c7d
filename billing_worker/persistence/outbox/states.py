"""The present subscriptions and invoices, with everything that a public state contains."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, exists, select

from billing_worker.persistence.schema.tables import cards, customers, invoices, subscriptions


def _subscriptions() -> Select[Any]:
    return (
        select(
            subscriptions,
            customers.c.reference_id.label("customer_reference"),
            cards.c.mask.label("card_mask"),
            cards.c.brand.label("card_brand"),
            cards.c.expiry_month.label("card_expiry_month"),
            cards.c.expiry_year.label("card_expiry_year"),
        )
        .join(customers, customers.c.id == subscriptions.c.customer_id)
        .join(cards, cards.c.id == subscriptions.c.card_id, isouter=True)
    )


def of_subscriptions(connection: Connection, ids: Collection[int]) -> dict[int, Row[Any]]:
    """Return subscriptions with customer and card, by id. Takes no locks."""
    rows = connection.execute(_subscriptions().where(subscriptions.c.id.in_(ids)))
    return {row.id: row for row in rows}


def of_invoices(connection: Connection, ids: Collection[int]) -> dict[int, Row[Any]]:
    rows = connection.execute(select(invoices).where(invoices.c.id.in_(ids)))
    return {row.id: row for row in rows}


def subscription_named(connection: Connection, reference: str) -> Row[Any] | None:
    query = _subscriptions().where(subscriptions.c.reference_id == reference)
    return connection.execute(query).one_or_none()


def subscriptions_of_customer(
    connection: Connection, reference: str, limit: int
) -> Sequence[Row[Any]]:
    """Return them newest first, with one-off charges."""
    query = _subscriptions().where(customers.c.reference_id == reference)
    return connection.execute(query.order_by(subscriptions.c.id.desc()).limit(limit)).all()


def is_customer(connection: Connection, reference: str) -> bool:
    query = select(exists().where(customers.c.reference_id == reference))
    return bool(connection.execute(query).scalar())


def invoice_named(connection: Connection, reference: str) -> Row[Any] | None:
    query = select(invoices).where(invoices.c.reference_id == reference)
    return connection.execute(query).one_or_none()


def newest_invoices(connection: Connection, subscription_id: int, limit: int) -> Sequence[Row[Any]]:
    query = (
        select(invoices)
        .where(invoices.c.subscription_id == subscription_id)
        .order_by(invoices.c.period_number.desc())
        .limit(limit)
    )
    return connection.execute(query).all()
