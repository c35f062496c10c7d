"""A customer's card goes: its token is forgotten, and nothing can be charged with it any more."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import card_setups, cards, customers, history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store


def remove_card(
    store: Store, clock: Clock, *, customer: str, card_id: int, by: str, why: str | None
) -> dict[str, Any]:
    """Forget the token of a card. Its mask stays in the history of what it has paid.

    Return {customer, card_id, outcome}. Raises InvalidInput on `customer` or `card_id` when there is
    none, and on `card_id` while it pays a subscription or is being charged: replace it there first.
    """
    now = clock.now()
    with store.transaction() as connection:
        customer_id = customers.find(connection, customer)
        if customer_id is None:
            raise InvalidInput("customer", f"there is no customer {customer!r}")
        # A card that is being given to a subscription, or sold with, is not taken away meanwhile.
        card_setups.lock_subscriptions_of(connection, customer_id)
        known = {row.id: row for row in cards.listed(connection, customer_id)}
        if card_id not in known:
            raise InvalidInput("card_id", f"the customer has no card {card_id}")
        told = {"customer": customer, "card_id": card_id}
        if cards.is_removed(known[card_id]):
            return told | {"outcome": "unchanged"}
        _require_unused(connection, customer_id, card_id)
        cards.remove(connection, card_id)
        event = Event(EventKind.CARD_REMOVED, now, by, told | {"why": why})
        history.write(connection, [Entry(event)])
    return told | {"outcome": "changed"}


def _require_unused(connection: Connection, customer_id: int, card_id: int) -> None:
    pays = [row.reference_id for row in cards.paid_with(connection, customer_id, card_id)]
    if pays:
        raise InvalidInput("card_id", f"pays {', '.join(pays[:5])}: give those another card first")
    if cards.is_being_charged(connection, card_id):
        raise InvalidInput("card_id", "is being charged: ask again when that is decided")
