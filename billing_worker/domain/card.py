"""A stored card: whether it may be charged, which of several is, and when it will expire."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from billing_worker.domain.attempt import Origin
from billing_worker.domain.secret import Secret

WARN_DAYS = (60, 15)
"""How long before its expiry a customer is told, the first and the last time."""

EXPIRED = "card_expired"

LAST_MIDNIGHT = timedelta(hours=12)
"""A month is over everywhere when it is over at UTC-12: an hour too early loses a good charge."""


@dataclass(frozen=True, slots=True)
class Card:
    id: int
    fingerprint: str
    brand: str | None
    expiry_month: int | None
    expiry_year: int | None
    unusable_reason: str | None  # a hard decline; no attempt is ever made on it again
    backup_since: datetime | None  # the customer's consent to charge it instead of a dead one
    declined_at: datetime | None = None  # the last decline of any card with this fingerprint

    @property
    def expires_at(self) -> datetime | None:
        """The end of the printed month; None: unknown, so the bank will tell."""
        if self.expiry_year is None or self.expiry_month is None:
            return None
        years, month = divmod(self.expiry_month, 12)
        first = datetime(self.expiry_year + years, month + 1, 1, tzinfo=UTC)
        return first + LAST_MIDNIGHT


def fingerprint(token: Secret) -> str:
    """Equal for equal tokens, so that they share a network budget, and unreadable.

    A plain SHA-256: tokens are random and long (32 characters and more, gateway.md §8), so nobody
    guesses one back. A key would have to be kept for ever: derived from the vault's keys it would
    change with them, and every budget would be forgotten on the day of a rotation.
    """
    return hashlib.sha256(b"billing-worker card " + token.reveal().encode()).hexdigest()


def obstacle(card: Card, now: datetime) -> str | None:
    """Why this card must not be charged, or None. The words are the invoice's reason."""
    if card.unusable_reason is not None:
        return f"card_unusable: {card.unusable_reason}"
    if card.expires_at is not None and card.expires_at <= now:
        return EXPIRED
    return None


def backup_of(dead: Card, others: Sequence[Card], now: datetime) -> Card | None:
    """The card that the customer agreed to most recently, if it can still be charged.

    Only for a card that a bank has refused for good: one that merely has no money today, or whose
    expiry is near, is no reason to touch another (cf. woocommerce-gateway-stripe issue 37).
    """
    if dead.unusable_reason is None:
        return None
    agreed = [
        (card.backup_since, card.id, card)
        for card in others
        if card.backup_since is not None
        and card.fingerprint != dead.fingerprint
        and obstacle(card, now) is None
    ]
    return max(agreed)[2] if agreed else None


def other_card(
    card: Card, default_id: int | None, owned: Sequence[Card], now: datetime
) -> Origin | None:
    """As what another card of the customer could be charged if the bank refused this one.

    `new_card`: it is the default by now. `backup`: with consent, should this one be dead.
    """
    if any(
        other.id == default_id
        and other.fingerprint != card.fingerprint  # the same card entered again is no other one
        and obstacle(other, now) is None
        for other in owned
    ):
        return Origin.NEW_CARD
    dead = replace(card, unusable_reason="refused")
    return Origin.BACKUP if backup_of(dead, owned, now) is not None else None


def warning_due(card: Card, warned_days: int | None, now: datetime) -> int | None:
    """Which of WARN_DAYS is to be told now, or None. `warned_days` is the last one told.

    After a pause of the sweep only the nearer of two missed warnings is told.
    """
    if card.expires_at is None or card.expires_at <= now or card.unusable_reason is not None:
        return None
    left = card.expires_at - now
    due = [days for days in WARN_DAYS if left <= timedelta(days=days)]
    nearest = min(due, default=None)
    if nearest is None or (warned_days is not None and warned_days <= nearest):
        return None
    return nearest
