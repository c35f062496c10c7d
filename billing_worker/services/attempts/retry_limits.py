"""Checks inside the submitting transaction whether a card may be charged now.

Retry limits are kept per card fingerprint and count every attempt, whatever its origin. A network
limit counts declines and attempts that may become declines. A card without a recent decline and
without another live attempt has no used limit: for ordinary charges this costs one query per batch.
Only the other cards are locked and counted.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.domain import card as card_rules
from billing_worker.domain import network_rules
from billing_worker.domain.card import Card
from billing_worker.domain.money import Money
from billing_worker.domain.network_rules import Try
from billing_worker.domain.outcome import Forbidden
from billing_worker.persistence import cards

CARD_RULE = "card.usable"


class Budget:
    """The retry limits of some cards, locked until the transaction ends."""

    def __init__(self, connection: Connection, card_ids: Collection[int], now: datetime) -> None:
        self._now = now
        self._tries: dict[str, list[Try]] = {}
        since = now - network_rules.LONGEST_COUNTED
        self._cards = cards.with_a_past(connection, card_ids, since, now)
        counted = [c.id for c in self._cards.values() if card_rules.obstacle(c, now) is None]
        if counted:
            locked = cards.lock_budgets(connection, counted)
            self._cards |= locked
            self._tries = {card.fingerprint: [] for card in locked.values()}
            self._tries |= cards.tries_on(connection, locked.values(), since, now)

    def spend(self, card_id: int, money: Money, invoice_id: int) -> Forbidden | None:
        """Count an attempt of this amount, or return which rule forbids it."""
        card = self._cards.get(card_id)
        if card is None:
            return None
        forbidden = self._against(card, money, invoice_id)
        if forbidden is None and card.fingerprint in self._tries:
            self._tries[card.fingerprint].append(
                Try(self._now, money, open=True, charge=invoice_id)
            )
        return forbidden

    def _against(self, card: Card, money: Money, invoice_id: int) -> Forbidden | None:
        obstacle = card_rules.obstacle(card, self._now)
        if obstacle is not None:
            # Due again at once: the next claim takes the backup card, or asks the customer for
            # another one.
            return Forbidden(CARD_RULE, obstacle, self._now)
        tries = self._tries.get(card.fingerprint, [])
        refused = network_rules.refusal(card.brand, money, tries, self._now, charge=invoice_id)
        return Forbidden(refused.rule, refused.reason, refused.until) if refused else None
