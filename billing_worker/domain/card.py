"""A stored card: whether it may be charged, which other card replaces it, and when it expires."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from billing_worker.domain.attempt import Origin
from billing_worker.domain.secret import Secret

WARN_DAYS = (60, 15)
"""Days before the expiry at which the customer is warned: the first and the last warning."""

CARD_EXPIRED = "card_expired"
MISSING = "card_missing"

LAST_MIDNIGHT = timedelta(hours=12)
"""The printed month ends in the last time zone, UTC-12: earlier, the card may still be valid."""


@dataclass(frozen=True, slots=True)
class Card:
    id: int
    fingerprint: str
    brand: str | None
    expiry_month: int | None
    expiry_year: int | None
    unusable_reason: str | None  # the hard decline after which it is never charged again
    backup_since: datetime | None  # when the customer agreed to its use in place of a dead card
    declined_at: datetime | None = None  # the last decline of any card with this fingerprint
    default_since: datetime | None = None  # when the customer made it the default for everything

    @property
    def expires_at(self) -> datetime | None:
        """The end of the printed month, in UTC; None: unknown, and the bank decides."""
        if self.expiry_year is None or self.expiry_month is None:
            return None
        years, month = divmod(self.expiry_month, 12)
        first = datetime(self.expiry_year + years, month + 1, 1, tzinfo=UTC)
        return first + LAST_MIDNIGHT


def fingerprint(token: Secret) -> str:
    """Return a one-way digest of a token. Equal tokens share the network's retry limits by it.

    SHA-256 without a key is enough: tokens are random and have 32 or more characters (gateway.md
    §8), so nobody can guess one. A key derived from the vault keys would change at a key rotation,
    and every card's count of declines would restart at zero.
    """
    return hashlib.sha256(b"billing-worker card " + token.reveal().encode()).hexdigest()


def obstacle(card: Card, now: datetime) -> str | None:
    """Return why this card must not be charged, or None. The text becomes the invoice's reason."""
    if card.unusable_reason is not None:
        return f"card_unusable: {card.unusable_reason}"
    if card.expires_at is not None and card.expires_at <= now:
        return CARD_EXPIRED
    return None


def payer(default: Card | None, owned: Callable[[], Sequence[Card]], now: datetime) -> Card | str:
    """Return the card that pays: the default one, or a backup if a bank has refused it for good.

    If there is none, return the reason: no attempt is made with a dead card. `owned` reads the
    customer's cards and is called only when a backup is needed.
    """
    if default is None:
        return MISSING
    against = obstacle(default, now)
    if against is None:
        return default
    backup = backup_of(default, owned(), now) if default.unusable_reason is not None else None
    return backup or against


def default_of(owned: Iterable[Card], paying: Collection[int], now: datetime) -> Card | None:
    """Return the card for a charge that names none, or None.

    That is the customer's latest default for everything; else the newest card that pays one of
    their subscriptions (`paying`: card ids); else their newest card. A card that is only a backup
    is never chosen.
    """
    chosen = [
        ((card.default_since or _NEVER, card.id in paying, card.id), card)
        for card in owned
        if obstacle(card, now) is None
        and (card.backup_since is None or card.default_since or card.id in paying)
    ]
    return max(chosen, key=lambda one: one[0])[1] if chosen else None


_NEVER = datetime.min.replace(tzinfo=UTC)


REMOVED = "removed"
"""Begins the reason why a card is unusable whose token is forgotten; what the bank has said of it follows."""


def is_later_expiry(card: Card, month: int | None, year: int | None) -> bool:
    """Whether a known card comes with a later expiry: the bank has renewed it."""
    if month is None or year is None:
        return False
    known = (card.expiry_year or 0, card.expiry_month or 0)
    return (year, month) > known


def died_of_age(reason: str | None) -> bool:
    """Whether a bank refused the card only for its expiry: a renewed card may be charged again."""
    return (reason or "").endswith("card_expired")


def backup_of(dead: Card, others: Sequence[Card], now: datetime) -> Card | None:
    """Return the backup card with the newest consent that can be charged, or None.

    A backup replaces only a card that a bank has refused for good, never one that merely lacks
    funds or expires soon (cf. woocommerce-gateway-stripe issue 37).
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
    """Return the origin with which another card could be charged if the bank refused this one.

    `new_card`: another card is the default by now. `backup`: the customer has agreed to a backup
    card, and this one would be dead. None: there is no other card.
    """
    if any(
        other.id == default_id
        and other.fingerprint != card.fingerprint  # the same card stored twice does not count
        and obstacle(other, now) is None
        for other in owned
    ):
        return Origin.NEW_CARD
    dead = replace(card, unusable_reason="refused")
    return Origin.BACKUP if backup_of(dead, owned, now) is not None else None


def warning_due(card: Card, warned_days: int | None, now: datetime) -> int | None:
    """Return which of WARN_DAYS to announce now, or None. `warned_days` is the last one announced.

    If the sweep has missed both warnings, only the nearer one is announced.
    """
    if card.expires_at is None or card.expires_at <= now or card.unusable_reason is not None:
        return None
    left = card.expires_at - now
    due = [days for days in WARN_DAYS if left <= timedelta(days=days)]
    nearest = min(due, default=None)
    if nearest is None or (warned_days is not None and warned_days <= nearest):
        return None
    return nearest
