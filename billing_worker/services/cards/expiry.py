"""Warnings before a customer's card expires."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain import card as card_rules
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import cards, history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store

EXPIRING_BATCH = 500


def warn_expiring(store: Store, clock: Clock) -> int:
    """Tell of cards that expire in 60 and in 15 days, once each. Returns how many were told of.

    Safe to run as often as one likes: what has been told is remembered with the card.
    """
    told, last_id = 0, 0
    while True:
        with store.transaction() as connection:
            found = cards.expiring(connection, _months_ahead(clock.now()), last_id, EXPIRING_BATCH)
            told += _warn(connection, found, clock.now())
        if len(found) < EXPIRING_BATCH:
            return told
        _, last_id = found[-1]


def _months_ahead(now: datetime) -> list[tuple[int, int]]:
    """(year, month) of every card that may have to be warned about: this month and two more."""
    first = now.year * 12 + now.month - 1
    return [(m // 12, m % 12 + 1) for m in range(first, first + 3)]


def _warn(connection: Connection, expiring: Sequence[tuple[int, int]], now: datetime) -> int:
    entries: list[Entry] = []
    locked = cards.lock(connection, {card_id for card_id, _ in expiring})
    for card_id, subscription_id in expiring:
        row = locked[card_id]
        days = card_rules.warning_due(cards.card_from(row), row.warned_days, now)
        if days is None:
            continue
        cards.remember_warning(connection, [row.id], days)
        data = {
            "card_id": row.id,
            "mask": row.mask,
            "expires": f"{row.expiry_year}-{row.expiry_month:02}",
            "days": days,
        }
        entries.append(Entry(Event(EventKind.CARD_EXPIRING, now, "cards", data), subscription_id))
    history.write(connection, entries)
    return len(entries)
