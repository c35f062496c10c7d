"""A customer's cards as they are listed, without tokens."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain import card as card_rules
from billing_worker.persistence import cards, customers, subscriptions


def list_cards(
    connection: Connection, reference: str, now: datetime
) -> list[dict[str, Any]] | None:
    """All cards of a customer, by the customer's reference or that of a subscription. None: there is
    neither.

    `default`: it pays what names no card; `default_for`: subscriptions that it pays.
    """
    customer_id = customers.find(connection, reference)
    if customer_id is None:
        subscription = subscriptions.find(connection, reference)
        if subscription is None:
            return None
        customer_id = subscription.customer_id
    default = cards.defaults_of(connection, [customer_id], now).get(customer_id)
    pays_for = cards.paid_by(connection, customer_id)
    return [
        _listed(row, now)
        | {
            "default": default is not None and default.id == row.id,
            "default_for": pays_for.get(row.id, []),
        }
        for row in cards.listed(connection, customer_id)
        if not cards.is_removed(row)
    ]


def _listed(row: Row[Any], now: datetime) -> dict[str, Any]:
    return {
        "card_id": row.id,
        "holder": row.holder,
        "mask": row.mask,
        "brand": row.brand,
        "expires": f"{row.expiry_year}-{row.expiry_month:02}" if row.expiry_year else None,
        "issuer": row.issuer_name,
        "backup": row.backup_consent,
        "not_chargeable": card_rules.obstacle(cards.card_from(row), now),
    }
