"""Stored cards, and what is remembered about them across all their customers and invoices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Row,
    and_,
    bindparam,
    func,
    or_,
    select,
    update,
)

from billing_worker.domain.card import Card
from billing_worker.domain.money import Money
from billing_worker.domain.network_rules import Try
from billing_worker.domain.subscription import BILLABLE
from billing_worker.persistence.tables import attempts, cards, subscriptions

# Not the token: what is only asked about need not be carried.
_COLUMNS: tuple[Any, ...] = (
    cards.c.id,
    cards.c.customer_id,
    cards.c.fingerprint,
    cards.c.brand,
    cards.c.expiry_month,
    cards.c.expiry_year,
    cards.c.unusable_reason,
    cards.c.backup_since,
    cards.c.declined_at,
)


def card_from(row: Row[Any]) -> Card:
    return Card(
        id=row.id,
        # A card from before there were fingerprints shares its budget with no other.
        fingerprint=row.fingerprint or f"card {row.id}",
        brand=row.brand,
        expiry_month=row.expiry_month,
        expiry_year=row.expiry_year,
        unusable_reason=row.unusable_reason,
        backup_since=row.backup_since,
        declined_at=row.declined_at,
    )


# Asked for every batch of charges, so built once.
_THESE: BindParameter[int] = bindparam("ids", expanding=True)
_BY_IDS = select(*_COLUMNS).where(cards.c.id.in_(_THESE))
_WITH_A_PAST = _BY_IDS.where(
    or_(
        cards.c.unusable_reason.is_not(None),
        cards.c.declined_at > bindparam("since", type_=cards.c.declined_at.type),
        cards.c.expiry_year <= bindparam("year"),
    )
)


def by_ids(connection: Connection, card_ids: Collection[int]) -> dict[int, Card]:
    rows = connection.execute(_BY_IDS, {"ids": sorted(card_ids)})
    return {row.id: card_from(row) for row in rows}


def with_a_past(
    connection: Connection, card_ids: Collection[int], since: datetime, now: datetime
) -> dict[int, Card]:
    """Those of the cards that something may stand against: dead, declined since then, or expired.

    Hardly any, so that asking for all the cards of a batch costs little more than the question.
    """
    asked = {"ids": sorted(card_ids), "since": since, "year": now.year}
    return {row.id: card_from(row) for row in connection.execute(_WITH_A_PAST, asked)}


def of_customers(connection: Connection, customer_ids: Collection[int]) -> dict[int, list[Card]]:
    """By customer id, the oldest first."""
    chosen = select(*_COLUMNS).where(cards.c.customer_id.in_(customer_ids))
    found: dict[int, list[Card]] = defaultdict(list)
    for row in connection.execute(chosen.order_by(cards.c.id)):
        found[row.customer_id].append(card_from(row))
    return found


def of_subscription(connection: Connection, subscription_id: int) -> list[Card]:
    """All cards of the subscription's customer, the oldest first."""
    query = (
        select(*_COLUMNS)
        .join(subscriptions, subscriptions.c.customer_id == cards.c.customer_id)
        .where(subscriptions.c.id == subscription_id)
        .order_by(cards.c.id)
    )
    return [card_from(row) for row in connection.execute(query)]


def _alike(card_ids: Collection[int]) -> ColumnElement[bool]:
    """These cards, and every other one with the fingerprint of one of them."""
    ids = sorted(card_ids)
    prints = select(cards.c.fingerprint).where(
        cards.c.id.in_(ids), cards.c.fingerprint.is_not(None)
    )
    return or_(cards.c.id.in_(ids), cards.c.fingerprint.in_(prints))


def lock_budgets(connection: Connection, card_ids: Collection[int]) -> dict[int, Card]:
    """Lock all cards that share a budget with one of these, and read them anew, by id.

    Until the transaction ends nobody else counts their tries: two attempts cannot both be the
    last one that is allowed. The lock is the weak one: foreign keys do not wait for it.
    """
    query = (
        select(*_COLUMNS)
        .where(_alike(card_ids))
        .order_by(cards.c.id)
        .with_for_update(key_share=True)
    )
    return {row.id: card_from(row) for row in connection.execute(query)}


def tries_on(
    connection: Connection, locked: Collection[Card], since: datetime
) -> dict[str, list[Try]]:
    """Declined and still open attempts on these cards by fingerprint, whatever their origin."""
    fingerprint_of = {card.id: card.fingerprint for card in locked}
    query = select(
        attempts.c.card_id,
        attempts.c.submitted_at,
        attempts.c.amount_minor,
        attempts.c.currency,
        attempts.c.original_code,
    ).where(
        attempts.c.card_id.in_(sorted(fingerprint_of)),
        attempts.c.status.in_(["submitted", "declined"]),
        attempts.c.submitted_at > since,
    )
    found: dict[str, list[Try]] = defaultdict(list)
    for row in connection.execute(query):
        money = Money.from_minor(row.amount_minor, row.currency)
        found[fingerprint_of[row.card_id]].append(Try(row.submitted_at, money, row.original_code))
    return found


def remember_decline(
    connection: Connection, card_id: int, now: datetime, unusable_reason: str | None
) -> None:
    """Note a decline on all cards alike; with a reason, none of them is ever charged again."""
    lock_budgets(connection, [card_id])  # in the order of their ids, as everybody locks them
    connection.execute(
        update(cards)
        .where(_alike([card_id]))
        .values(
            declined_at=now,
            unusable_reason=func.coalesce(cards.c.unusable_reason, unusable_reason),
        )
    )


def remembered(connection: Connection, fingerprints: Collection[str]) -> dict[str, Card]:
    """By fingerprint, of those that were ever declined: what a card that is stored anew inherits."""
    query = select(*_COLUMNS).where(
        cards.c.fingerprint.in_(sorted(fingerprints)), cards.c.declined_at.is_not(None)
    )
    return {row.fingerprint: card_from(row) for row in connection.execute(query)}


def listed(connection: Connection, customer_id: int) -> Sequence[Row[Any]]:
    """The cards of one customer with the references of the subscriptions they pay by default."""
    query = select(cards).where(cards.c.customer_id == customer_id).order_by(cards.c.id)
    return connection.execute(query).all()


def paid_by(connection: Connection, customer_id: int) -> dict[int, list[str]]:
    """References of the customer's subscriptions by the id of their default card."""
    query = select(subscriptions.c.card_id, subscriptions.c.reference_id).where(
        subscriptions.c.customer_id == customer_id, subscriptions.c.card_id.is_not(None)
    )
    found: dict[int, list[str]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.card_id].append(row.reference_id)
    return found


def make_default(connection: Connection, subscription_id: int, card_id: int) -> None:
    connection.execute(
        update(subscriptions).where(subscriptions.c.id == subscription_id).values(card_id=card_id)
    )


def allow_backup(connection: Connection, card_id: int, now: datetime, consent: str) -> None:
    connection.execute(
        update(cards).where(cards.c.id == card_id).values(backup_since=now, backup_consent=consent)
    )


def expiring(
    connection: Connection, months: Collection[tuple[int, int]], after_id: int, limit: int
) -> Sequence[Row[Any]]:
    """Cards that expire in one of the (year, month) pairs and pay for a billable subscription:
    the card's columns and `subscription_id`, in the order of that id, from `after_id` on.
    """
    due = or_(*(and_(cards.c.expiry_year == y, cards.c.expiry_month == m) for y, m in months))
    query = (
        select(cards, subscriptions.c.id.label("subscription_id"))
        .join(subscriptions, subscriptions.c.card_id == cards.c.id)
        .where(due, subscriptions.c.status.in_(sorted(BILLABLE)), subscriptions.c.id > after_id)
        .order_by(subscriptions.c.id)
        .limit(limit)
        .with_for_update(of=cards, key_share=True)
    )
    return connection.execute(query).all()


def remember_warning(connection: Connection, card_ids: Collection[int], days: int) -> None:
    connection.execute(
        update(cards).where(cards.c.id.in_(sorted(card_ids))).values(warned_days=days)
    )
