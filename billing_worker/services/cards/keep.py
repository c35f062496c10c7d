"""Storing a card: each customer's once, and only one that may be charged."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from billing_worker.domain import card as card_rules
from billing_worker.domain.card import fingerprint
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import card_of
from billing_worker.persistence import cards, customers
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.ports import Vault


def keep(
    connection: Connection, vault: Vault, card: CardRecord, customer_id: int, now: datetime
) -> int:
    """Store a card that is to be charged, unless the customer has it already. Returns its id.

    Raises InvalidInput on the field of a card that cannot be charged or is another customer's.
    """
    [card_id] = customers.add_cards(connection, [card_row(vault, card, customer_id, now)])
    require_chargeable(connection, card_id, now)
    return card_id


def require_chargeable(connection: Connection, card_id: int, now: datetime) -> None:
    # Read back: a token that was refused for good before brings its past with it.
    obstacle = card_rules.obstacle(cards.by_ids(connection, [card_id])[card_id], now)
    if obstacle is not None:
        field = "card.expiry_year" if obstacle == card_rules.CARD_EXPIRED else "card.token"
        raise InvalidInput(field, f"this card cannot be charged ({obstacle})")


def card_row(vault: Vault, card: CardRecord, customer_id: int, now: datetime) -> dict[str, Any]:
    return {
        "customer_id": customer_id,
        "token": vault.lock(card.token, card_of(customer_id)),
        "fingerprint": fingerprint(card.token),
        "mask": card.mask,
        "brand": card.brand,
        "expiry_month": card.expiry_month,
        "expiry_year": card.expiry_year,
        "created_at": now,
    }
