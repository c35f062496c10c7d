"""Stored cards, and what is remembered about them across all their customers and invoices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from random import Random
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    BindParameter,
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    any_,
    bindparam,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    text,
    update,
)
from sqlalchemy import case as case_when

from billing_worker.domain.attempt import Attempt, Origin
from billing_worker.domain.card import REMOVED, Card, default_of
from billing_worker.domain.money import Money
from billing_worker.domain.network_rules import Try
from billing_worker.domain.subscription import BILLABLE
from billing_worker.persistence.bulk import among
from billing_worker.persistence.schema.tables import (
    attempts,
    cards,
    customers,
    invoices,
    subscriptions,
)

# Without the token: rows that are only shown do not carry it.
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
    cards.c.default_since,
)


def card_from(row: Row[Any]) -> Card:
    return Card(
        id=row.id,
        # A card that is older than fingerprints shares its limits with no other card.
        fingerprint=row.fingerprint or f"card {row.id}",
        brand=row.brand,
        expiry_month=row.expiry_month,
        expiry_year=row.expiry_year,
        unusable_reason=row.unusable_reason,
        backup_since=row.backup_since,
        declined_at=row.declined_at,
        default_since=row.default_since,
    )


def tokens_in_use(connection: Connection, each: int, random: Random) -> list[Any]:
    """Return (encrypted token, customer_id, created_at) of cards in use: of the newest subscriptions, the
    oldest, and some in between.
    """
    ends = connection.execute(
        select(
            func.min(subscriptions.c.id).label("low"), func.max(subscriptions.c.id).label("high")
        )
    ).one()
    if ends.high is None:
        return []
    between = [random.randint(ends.low, ends.high) for _ in range(each)]
    in_use = (
        select(cards.c.id, cards.c.token, cards.c.customer_id, cards.c.created_at)
        .join(subscriptions, subscriptions.c.card_id == cards.c.id)
        .where(subscriptions.c.status.in_(sorted(BILLABLE)))
    )
    samples = (
        in_use.order_by(subscriptions.c.id).limit(each),
        in_use.order_by(subscriptions.c.id.desc()).limit(each),
        in_use.where(subscriptions.c.id.in_(between)),
    )
    rows: dict[int, Any] = {row.id: row for sample in samples for row in connection.execute(sample)}
    return list(rows.values())


_other = cards.alias("other")
# Not `card_id IN (…) OR fingerprint IN (…)`: that reads the whole table.
_ALIKE = or_(_other.c.id == cards.c.id, _other.c.fingerprint == cards.c.fingerprint)

# Literally the condition of the index `ix_attempts_budget`: with bound values SQLite does not use
# it.
_COUNTED = text("attempts.status IN ('prepared', 'submitted', 'declined')")
_LIVE_ON_ALIKE = (
    select(func.count())
    .select_from(_other.join(attempts, attempts.c.card_id == _other.c.id))
    .where(_ALIKE, _COUNTED, attempts.c.status != literal_column("'declined'"))
    .correlate(cards)
    .scalar_subquery()
)

# Built once, because every batch of charges needs it.
_THESE: BindParameter[int] = bindparam("ids", expanding=True)
_BY_IDS = select(*_COLUMNS).where(cards.c.id.in_(_THESE))
_HAS_A_PAST = or_(
    cards.c.unusable_reason.is_not(None),
    cards.c.declined_at > bindparam("since", type_=cards.c.declined_at.type),
    cards.c.expiry_year * 12 + cards.c.expiry_month < bindparam("month"),
    _LIVE_ON_ALIKE > 1,
)
_ONE_ARRAY = cards.c.id == any_(bindparam("ids", type_=ARRAY(BigInteger)))
_WITH_A_PAST = {
    "sqlite": _BY_IDS.where(_HAS_A_PAST),
    # A preview reads hundreds of cards at once: see `bulk.among`.
    "postgresql": select(*_COLUMNS).where(_ONE_ARRAY, _HAS_A_PAST),
}


def by_ids(connection: Connection, card_ids: Collection[int]) -> dict[int, Card]:
    rows = connection.execute(_BY_IDS, {"ids": sorted(card_ids)})
    return {row.id: card_from(row) for row in rows}


def with_a_past(
    connection: Connection, card_ids: Collection[int], since: datetime, now: datetime
) -> dict[int, Card]:
    """Return those of the cards that may be blocked.

    These are cards that are refused for good, declined or expired since then, or that share more
    than one live attempt with equal cards. They are few, so the query costs little for a batch.
    """
    asked = {"ids": sorted(card_ids), "since": since, "month": now.year * 12 + now.month}
    query = _WITH_A_PAST[connection.dialect.name]
    return {row.id: card_from(row) for row in connection.execute(query, asked)}


_OF_CUSTOMERS = (
    select(*_COLUMNS)
    .where(cards.c.customer_id.in_(bindparam("ids", expanding=True)))
    .order_by(cards.c.id)
)


def of_customers(connection: Connection, customer_ids: Collection[int]) -> dict[int, list[Card]]:
    """Return cards by customer id, the oldest first."""
    found: dict[int, list[Card]] = defaultdict(list)
    for row in connection.execute(_OF_CUSTOMERS, {"ids": list(customer_ids)}):
        found[row.customer_id].append(card_from(row))
    return found


_PAYING = select(subscriptions.c.card_id).where(
    subscriptions.c.customer_id.in_(bindparam("ids", expanding=True)),
    subscriptions.c.card_id.is_not(None),
    subscriptions.c.kind == "recurring",
    subscriptions.c.status.not_in(["cancelled", "ended"]),
)


def defaults_of(
    connection: Connection, customer_ids: Collection[int], now: datetime
) -> dict[int, Card]:
    """By customer id: the card that pays what names none. Customers without one are left out."""
    asked = {"ids": list(customer_ids)}
    paying = set(connection.execute(_PAYING, asked).scalars())
    found = {
        customer_id: default_of(owned, paying, now)
        for customer_id, owned in of_customers(connection, customer_ids).items()
    }
    return {customer_id: card for customer_id, card in found.items() if card is not None}


def of_subscription(connection: Connection, subscription_id: int) -> list[Card]:
    """Return all cards of the subscription's customer, the oldest first."""
    query = (
        select(*_COLUMNS)
        .join(subscriptions, subscriptions.c.customer_id == cards.c.customer_id)
        .where(subscriptions.c.id == subscription_id)
        .order_by(cards.c.id)
    )
    return [card_from(row) for row in connection.execute(query)]


_ALIKE_IDS = select(_other.c.id).join(cards, _ALIKE).where(cards.c.id.in_(_THESE))
_BUDGETS = (
    select(*_COLUMNS)
    .where(cards.c.id.in_(_ALIKE_IDS.correlate(None)))
    .order_by(cards.c.id)
    .with_for_update(key_share=True)
)


def lock_budgets(connection: Connection, card_ids: Collection[int]) -> dict[int, Card]:
    """Lock all cards that share retry limits with one of these, read them again, and return them by
    id.

    Until the transaction ends, no other transaction counts attempts on these cards: two attempts
    cannot both be the last allowed one. The lock is FOR NO KEY UPDATE, so foreign keys do not wait
    for it.
    """
    rows = connection.execute(_BUDGETS, {"ids": sorted(card_ids)})
    return {row.id: card_from(row) for row in rows}


_PREPARED = select(
    attempts.c.id,
    attempts.c.invoice_id,
    attempts.c.card_id,
    attempts.c.amount_minor,
    attempts.c.currency,
).where(attempts.c.card_id.in_(_THESE), _COUNTED, attempts.c.status == literal_column("'prepared'"))
_TRIES = select(
    attempts.c.id,
    attempts.c.invoice_id,
    attempts.c.card_id,
    attempts.c.status,
    attempts.c.submitted_at,
    attempts.c.amount_minor,
    attempts.c.currency,
    attempts.c.original_code,
).where(
    attempts.c.card_id.in_(_THESE),
    _COUNTED,
    attempts.c.submitted_at > bindparam("since", type_=attempts.c.submitted_at.type),
)


def tries_on(
    connection: Connection, locked: Collection[Card], since: datetime, now: datetime
) -> dict[str, list[Try]]:
    """Return declined and live attempts on these cards by fingerprint, whatever their origin.

    Includes attempts that another transaction is submitting now: such an attempt met no other one,
    so it took no card lock, and its `submitted` is not visible yet. It holds a lock on its own row.
    """
    fingerprint_of = {card.id: card.fingerprint for card in locked}
    asked = {"ids": sorted(fingerprint_of), "since": since}
    # The order matters: the last statement sees what was submitted between the first two.
    prepared = connection.execute(_PREPARED, asked).all()
    idle = _PREPARED.with_for_update(read=True, key_share=True, skip_locked=True)
    idle_ids = {row.id for row in connection.execute(idle, asked)} if prepared else set()
    made = connection.execute(_TRIES, asked).all()
    settled_or_idle = idle_ids | {row.id for row in made}
    being_armed = [row for row in prepared if row.id not in settled_or_idle]
    found: dict[str, list[Try]] = defaultdict(list)
    for row in made:
        money = Money.from_minor(row.amount_minor, row.currency)
        is_open = row.status == "submitted"
        made_then = Try(
            row.submitted_at, money, row.original_code, open=is_open, charge=row.invoice_id
        )
        found[fingerprint_of[row.card_id]].append(made_then)
    for one in being_armed:
        money = Money.from_minor(one.amount_minor, one.currency)
        found[fingerprint_of[one.card_id]].append(Try(now, money, open=True, charge=one.invoice_id))
    return found


def remember_declines(
    connection: Connection, declined: Sequence[tuple[int, str | None]], now: datetime
) -> None:
    """Write declines to all equal cards: (card id, why it must never be charged again, or None).

    The caller holds the locks of `lock_budgets`.
    """
    by_reason: dict[str | None, list[int]] = defaultdict(list)
    for card_id, reason in declined:
        by_reason[reason].append(card_id)
    for reason, card_ids in by_reason.items():
        known: ColumnElement[Any] = func.coalesce(cards.c.unusable_reason, reason)
        if reason is not None:  # It holds for a removed card too, when that is given again.
            known = case_when(
                (cards.c.unusable_reason == REMOVED, f"{REMOVED}: {reason}"), else_=known
            )
        connection.execute(
            update(cards)
            .where(cards.c.id.in_(_ALIKE_IDS.correlate(None)))
            .values(declined_at=now, unusable_reason=known),
            {"ids": sorted(card_ids)},
        )


def lock_known(connection: Connection, fingerprints: Collection[str]) -> Sequence[Row[Any]]:
    """Lock and return the stored cards with these fingerprints, oldest first.

    Waits for a decline that is being written.
    """
    query: Select[Any] = (
        select(*_COLUMNS, cards.c.mask, cards.c.holder, cards.c.issuer_name, cards.c.issuer_country)
        .where(among(connection, cards.c.fingerprint, fingerprints))
        .order_by(cards.c.id)
        .with_for_update(key_share=True)
    )
    return connection.execute(query).all()


def renew(
    connection: Connection, card_ids: Collection[int], *, month: int, year: int, is_revived: bool
) -> None:
    """Cards of one fingerprint have a later expiry; `is_revived`: they may be charged again."""
    values: dict[str, Any] = {"expiry_month": month, "expiry_year": year, "warned_days": None}
    if is_revived:
        values["unusable_reason"] = None
    connection.execute(update(cards).where(cards.c.id.in_(sorted(card_ids))).values(values))


def complete(connection: Connection, card_id: int, known_by_now: Mapping[str, Any]) -> None:
    connection.execute(update(cards).where(cards.c.id == card_id).values(dict(known_by_now)))


def is_removed(row: Row[Any]) -> bool:
    return (row.unusable_reason or "").startswith(REMOVED)


def remove(connection: Connection, card_id: int) -> None:
    """Forget its token and consents. What is over is no longer paid with it."""
    before = func.coalesce(literal(": ") + cards.c.unusable_reason, "")
    connection.execute(
        update(cards)
        .where(cards.c.id == card_id)
        .values(
            token=b"",
            unusable_reason=literal(REMOVED) + before,
            backup_since=None,
            backup_consent=None,
            default_since=None,
        )
    )
    connection.execute(
        update(subscriptions).where(subscriptions.c.card_id == card_id).values(card_id=None)
    )


def restore(connection: Connection, row: Row[Any], token: bytes) -> None:
    """The customer gives a removed card again: it is what it was."""
    _, _, before = row.unusable_reason.partition(": ")
    values = {"token": token, "unusable_reason": before or None}
    connection.execute(update(cards).where(cards.c.id == row.id).values(values))


def is_being_charged(connection: Connection, card_id: int) -> bool:
    live = exists().where(
        attempts.c.card_id == card_id, attempts.c.status.in_(["prepared", "submitted"])
    )
    return bool(connection.execute(select(live)).scalar())


def equal_charge(
    connection: Connection, attempt: Attempt, *, since: datetime
) -> tuple[str, bool] | None:
    """Return (reference, whether it is paid) of another invoice's charge of the same card and amount
    that was sold since then, not after this one, and not refused; one that is paid, if there is one.

    A page is no such charge: the customer may have paid with any card. Nor is a person's word that
    an attempt was paid: it may be wrong.
    """
    query = select(attempts.c.reference_id, attempts.c.status != "submitted").where(
        attempts.c.card_id.in_(_ALIKE_IDS.correlate(None)),
        attempts.c.invoice_id != attempt.invoice_id,
        attempts.c.status.in_(["submitted", "succeeded", "surplus"]),
        attempts.c.origin != Origin.LINK,
        attempts.c.resolved_at.is_(None),
        attempts.c.submitted_at >= since,
        # A charge that came later is not what the acquirer has seen before.
        attempts.c.submitted_at <= attempt.submitted_at,
        # Two undecided ones must not wait for each other.
        or_(attempts.c.status != "submitted", attempts.c.id < attempt.id),
        attempts.c.amount_minor == attempt.money.minor,
        attempts.c.currency == attempt.money.currency,
    )
    found = connection.execute(query, {"ids": [attempt.card_id]}).all()
    return max(((name, bool(paid)) for name, paid in found), key=lambda one: one[1], default=None)


def codes_of_declines(connection: Connection, card_ids: Collection[int]) -> set[str]:
    """What the acquirer has ever said when it refused one of these cards."""
    query = select(attempts.c.original_code).where(
        attempts.c.card_id.in_(sorted(card_ids)),
        attempts.c.status == "declined",
        attempts.c.original_code.is_not(None),
    )
    return set(connection.execute(query).scalars())


def owners(connection: Connection, fingerprints: Collection[str]) -> defaultdict[str, set[str]]:
    """Return the references of customers who have a card with each fingerprint."""
    query = (
        select(cards.c.fingerprint, customers.c.reference_id)
        .join(customers, customers.c.id == cards.c.customer_id)
        .where(among(connection, cards.c.fingerprint, fingerprints))
    )
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row in connection.execute(query):
        found[row.fingerprint].add(row.reference_id)
    return found


def listed(connection: Connection, customer_id: int) -> Sequence[Row[Any]]:
    """Return the cards of one customer with the references of subscriptions they pay by default."""
    query = select(cards).where(cards.c.customer_id == customer_id).order_by(cards.c.id)
    return connection.execute(query).all()


def paid_with(connection: Connection, customer_id: int, card_id: int | None) -> Sequence[Row[Any]]:
    """(id, reference_id) of the customer's subscriptions that this card, or one alike, pays by
    default, and is still to pay; None: that have no card.
    """
    same = subscriptions.c.card_id.is_(None)
    if card_id is not None:
        alike = _ALIKE_IDS.correlate(None).params(ids=[card_id])
        same = subscriptions.c.card_id.in_(alike)
    owes = exists().where(
        invoices.c.subscription_id == subscriptions.c.id, invoices.c.status == "open"
    )
    goes_on = subscriptions.c.status.not_in(["cancelled", "ended"])
    query: Select[Any] = (
        select(subscriptions.c.id, subscriptions.c.reference_id)
        .where(subscriptions.c.customer_id == customer_id, same, or_(goes_on, owes))
        .where(subscriptions.c.status != "cancelled")
        .order_by(subscriptions.c.id)
    )
    return connection.execute(query).all()


def paid_by(connection: Connection, customer_id: int) -> dict[int, list[str]]:
    """Return references of the customer's subscriptions by the id of their default card."""
    query = select(subscriptions.c.card_id, subscriptions.c.reference_id).where(
        subscriptions.c.customer_id == customer_id, subscriptions.c.card_id.is_not(None)
    )
    found: dict[int, list[str]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.card_id].append(row.reference_id)
    return found


def make_default(connection: Connection, subscription_ids: Collection[int], card_id: int) -> None:
    connection.execute(
        update(subscriptions)
        .where(subscriptions.c.id.in_(subscription_ids))
        .values(card_id=card_id)
    )


def make_customers_default(connection: Connection, card_id: int, now: datetime) -> None:
    connection.execute(update(cards).where(cards.c.id == card_id).values(default_since=now))


def allow_backup(connection: Connection, card_id: int, now: datetime, consent: str) -> None:
    connection.execute(
        update(cards).where(cards.c.id == card_id).values(backup_since=now, backup_consent=consent)
    )


def expiring(
    connection: Connection, months: Collection[tuple[int, int]], after_id: int, limit: int
) -> list[tuple[int, int]]:
    """Return (card id, subscription id) of cards that expire in one of the (year, month) pairs.

    Only cards that pay for a billable subscription, ordered by subscription id, from `after_id` on.
    """
    due = or_(*(and_(cards.c.expiry_year == y, cards.c.expiry_month == m) for y, m in months))
    query = (
        select(cards.c.id.label("card_id"), subscriptions.c.id)
        .join(subscriptions, subscriptions.c.card_id == cards.c.id)
        .where(due, subscriptions.c.status.in_(sorted(BILLABLE)), subscriptions.c.id > after_id)
        .order_by(subscriptions.c.id)
        .limit(limit)
    )
    return [(row.card_id, row.id) for row in connection.execute(query)]


def lock(connection: Connection, card_ids: Collection[int]) -> dict[int, Row[Any]]:
    """Lock and return whole rows by id."""
    query = (
        select(cards)
        .where(cards.c.id.in_(sorted(card_ids)))
        .order_by(cards.c.id)
        .with_for_update(key_share=True)
    )
    return {row.id: row for row in connection.execute(query)}


def remember_warning(connection: Connection, card_ids: Collection[int], days: int) -> None:
    connection.execute(
        update(cards).where(cards.c.id.in_(sorted(card_ids))).values(warned_days=days)
    )
