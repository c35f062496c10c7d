"""Subscriptions and invoices as they are now, with all that a public state tells."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, Select, select

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
    """With customer and card, by id. Reads only: it waits for nobody."""
    rows = connection.execute(_subscriptions().where(subscriptions.c.id.in_(ids)))
    return {row.id: row for row in rows}


def of_invoices(connection: Connection, ids: Collection[int]) -> dict[int, Row[Any]]:
    rows = connection.execute(select(invoices).where(invoices.c.id.in_(ids)))
    return {row.id: row for row in rows}
