"""A customer's cards: another default, a backup with consent, and warnings before they expire.

A replaced card is tried at once on what waits for one. It takes the one slot that every attempt
takes: what is in flight is left to the gateway's word, and only its decline brings the new card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain import card as card_rules
from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.card import fingerprint
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.outcome import withdrawn
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.persistence import attempts, cards, claims, customers, history, subscriptions
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.invoicing.decided_at import CLOCKS_DIFFER, last_said, not_in_the_future
from billing_worker.services.ports import Vault

BATCH = 500


def replace_card(
    store: Store,
    vault: Vault,
    clock: Clock,
    *,
    subscription_reference: str,
    card: CardRecord,
    by: str,
    why: str | None,
    decided_at: datetime | None = None,
) -> dict[str, Any]:
    """Make `card` the subscription's default, and try it once on every invoice that waits for one.

    The uncollectible invoices of a suspended or ended subscription are owed again, so that paying
    them brings it back. A paused one's are tried when it is resumed. Returns {subscription,
    card_id, tried: [invoice], in_flight: [invoice]}. Raises InvalidInput on `reference_id`, on the
    field of a card that cannot be charged or is another customer's, or on `decided_at` when a newer
    decision has already named a card.
    """
    now = clock.now()
    with store.transaction() as connection:
        subscription = _locked(connection, subscription_reference)
        _require_newest(connection, subscription, decided_at, now)
        card_id = _add(connection, vault, subscription, card, now)
        tried, in_flight = pay_with(
            connection, subscription, card_id, by=by, why=why, now=now, decided_at=decided_at
        )
    return {
        "subscription": subscription_reference,
        "card_id": card_id,
        "tried": [invoice.reference_id for invoice in tried],
        "in_flight": in_flight,
    }


def pay_with(
    connection: Connection,
    subscription: Subscription,
    card_id: int,
    *,
    by: str,
    why: str | None,
    now: datetime,
    decided_at: datetime | None = None,
) -> tuple[list[Invoice], list[str]]:
    """Make a stored card the default of a locked subscription, and try it on what waits for one.

    Its invoices are locked after the card: whoever holds one of them without the subscription
    waits for no card. Returns (invoices that it is tried on, references of those in flight).
    """
    cards.make_default(connection, subscription.id, card_id)
    tried, in_flight = _try_it(connection, subscription, by, now)
    asked = {"by": by, "why": why, "card_id": card_id}
    if decided_at is not None:
        asked["decided_at"] = decided_at.isoformat()
    added = Event(EventKind.CARD_ADDED, now, by, asked | {"role": "default"})
    ordered = Event(EventKind.RETRY_ORDERED, now, by, asked | {"origin": Origin.NEW_CARD})
    history.write(connection, [Entry(added, subscription.id)])
    history.write(connection, [Entry(ordered, subscription.id, i.id) for i in tried])
    return tried, in_flight


def add_backup_card(
    store: Store,
    vault: Vault,
    clock: Clock,
    *,
    subscription_reference: str,
    card: CardRecord,
    consent: str,
    by: str,
) -> dict[str, Any]:
    """Keep a card that the customer allows to be charged when the default card is dead.

    `consent` says where the permission is recorded; without one there is no backup. Returns
    {subscription, card_id}. Raises InvalidInput as `replace_card` does, and on `consent`.
    """
    if not consent.strip():
        raise InvalidInput("consent", "must say where the customer's consent is recorded")
    now = clock.now()
    with store.transaction() as connection:
        subscription = _locked(connection, subscription_reference)
        card_id = _add(connection, vault, subscription, card, now)
        cards.allow_backup(connection, card_id, now, f"{by}: {consent}")
        data = {"card_id": card_id, "role": "backup", "consent": consent}
        event = Event(EventKind.CARD_ADDED, now, by, data)
        history.write(connection, [Entry(event, subscription.id)])
    return {"subscription": subscription_reference, "card_id": card_id}


def list_cards(
    connection: Connection, subscription_reference: str, now: datetime
) -> list[dict[str, Any]] | None:
    """All cards of the subscription's customer, without tokens; None: no such subscription."""
    subscription = subscriptions.find(connection, subscription_reference)
    if subscription is None:
        return None
    default_for = cards.paid_by(connection, subscription.customer_id)
    return [
        {
            "card_id": row.id,
            "mask": row.mask,
            "brand": row.brand,
            "expires": f"{row.expiry_year}-{row.expiry_month:02}" if row.expiry_year else None,
            "default_for": default_for.get(row.id, []),
            "backup": row.backup_consent,
            "not_chargeable": card_rules.obstacle(cards.card_from(row), now),
        }
        for row in cards.listed(connection, subscription.customer_id)
    ]


def warn_expiring(store: Store, clock: Clock) -> int:
    """Tell of cards that expire in 60 and in 15 days, once each. Returns how many were told of.

    Safe to run as often as one likes: what has been told is remembered with the card.
    """
    told, last_id = 0, 0
    while True:
        with store.transaction() as connection:
            found = cards.expiring(connection, _months_ahead(clock.now()), last_id, BATCH)
            told += _warn(connection, found, clock.now())
        if len(found) < BATCH:
            return told
        _, last_id = found[-1]


# --- replacing --------------------------------------------------------------------------------


def _locked(connection: Connection, reference: str) -> Subscription:
    subscription = subscriptions.lock(connection, reference)
    if subscription is None:
        raise InvalidInput("reference_id", f"there is no subscription {reference!r}")
    return subscription


def _require_newest(
    connection: Connection, subscription: Subscription, decided_at: datetime | None, now: datetime
) -> None:
    """An older card must not take the place of a newer one because it is told of later."""
    if decided_at is None:
        return
    at = not_in_the_future(decided_at, now)
    last = last_said(connection, subscription.id, frozenset({EventKind.CARD_ADDED}))
    if last is not None and at < last - CLOCKS_DIFFER:
        reason = f"is before the last decision about its card, which is of {last.isoformat()}"
        raise InvalidInput("decided_at", reason)


def _add(
    connection: Connection,
    vault: Vault,
    subscription: Subscription,
    card: CardRecord,
    now: datetime,
) -> int:
    row = card_row(vault, card, subscription.customer_id, now)
    [card_id] = customers.add_cards(connection, [row])
    # Read back: a token that was refused for good before brings its past with it.
    obstacle = card_rules.obstacle(cards.by_ids(connection, [card_id])[card_id], now)
    if obstacle is not None:
        field = "card.expiry_year" if obstacle == card_rules.EXPIRED else "card.token"
        raise InvalidInput(field, f"this card cannot be charged ({obstacle})")
    return card_id


def _try_it(
    connection: Connection, subscription: Subscription, by: str, now: datetime
) -> tuple[list[Invoice], list[str]]:
    """(invoices that the new card is tried on, references of those in flight)."""
    items = claims.lock_open(connection, subscription.id)
    in_flight = [i.invoice.reference_id for i in items if _is_in_flight(i.live)]
    waiting = [
        item.invoice
        for item in items
        if not _is_in_flight(item.live) and _waits_for_a_card(item.invoice)
    ]
    if subscription.status in _PAID_LATE:
        waiting += claims.lock_given_up(connection, subscription.id)
    pairs = [(invoice, _tried_now(invoice, subscription, now)) for invoice in waiting]
    _withdraw_old_card(connection, items, by, now)
    attempts.save_open(connection, [], pairs)
    return [after for _, after in pairs], in_flight


_PAID_LATE = frozenset({SubscriptionStatus.SUSPENDED, SubscriptionStatus.ENDED})
"""What was given up there is all that a new card could be for."""


def _is_in_flight(live: Attempt | None) -> bool:
    """Sold, or on a page in front of the customer: its end comes first."""
    return live is not None and (
        live.status is AttemptStatus.SUBMITTED or live.origin is Origin.LINK
    )


def _waits_for_a_card(invoice: Invoice) -> bool:
    """In the ladder or at its end, or for the customer; or the gateway would not even create an
    invoice with the old token. What else waits for a person may have been paid: not tried.
    """
    in_ladder = invoice.first_declined_at is not None and invoice.next_attempt_at is not None
    reason = invoice.reason or ""
    ended = reason.startswith(invoices.RECOVERY_ENDED)
    return in_ladder or invoice.give_up_at is not None or ended or invoices.REFUSED in reason


def _tried_now(invoice: Invoice, subscription: Subscription, now: datetime) -> Invoice:
    owed = replace(invoices.owed_again(invoice, now), next_origin=Origin.NEW_CARD)
    paused = subscription.status is SubscriptionStatus.PAUSED
    return invoices.put_aside(owed) if paused else owed


def _withdraw_old_card(
    connection: Connection, items: Sequence[DueInvoice], by: str, now: datetime
) -> None:
    """Prepared attempts carry the old card. Nothing was sent: whoever arms one takes the lock of
    the subscription, which the caller holds. The next claim prepares another, with the new card.
    """
    reason = "card replaced"
    prepared = [live for item in items if (live := item.live) and not _is_in_flight(live)]
    attempts.save_open(connection, [(a, withdrawn(a, reason, now)) for a in prepared], [])
    claims.ring_later(connection, [a.invoice_id for a in prepared], now)
    event = Event(EventKind.ATTEMPT_NOT_CHARGED, now, by, {"reason": reason})
    subscription_of = {item.invoice.id: item.invoice.subscription_id for item in items}
    history.write(
        connection,
        (Entry(event, subscription_of[a.invoice_id], a.invoice_id, a.id) for a in prepared),
    )


# --- expiring ---------------------------------------------------------------------------------


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


def card_row(vault: Vault, card: CardRecord, customer_id: int, now: datetime) -> dict[str, Any]:
    return {
        "customer_id": customer_id,
        "token": vault.lock(card.token),
        "fingerprint": fingerprint(card.token),
        "mask": card.mask,
        "brand": card.brand,
        "expiry_month": card.expiry_month,
        "expiry_year": card.expiry_year,
        "created_at": now,
    }
