"""Records become subscriptions: in batches, each reference once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from billing_worker.clock import Clock
from billing_worker.domain.card import fingerprint
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.subscription import ONE_OFF, SubscriptionStatus
from billing_worker.persistence import customers, history, subscriptions
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.ports import Vault
from billing_worker.services.records import CardRecord, SubscriptionRecord
from billing_worker.services.stored_records import Difference, differences, record_from

TRIES = 3
"""Somebody else may add the same reference between our look and our insert; hardly ever twice."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """What became of each record of a batch, in order: added, unchanged or conflict."""

    outcomes: tuple[str, ...]
    conflicts: Mapping[int, tuple[Difference, ...]] = field(default_factory=dict)
    """By the position of the record: where it differs from what is known under its reference."""


def subscribe(
    store: Store,
    vault: Vault,
    clock: Clock,
    records: Sequence[SubscriptionRecord],
    *,
    by: str,
    dry_run: bool = False,
    held: bool = False,
) -> Subscribed:
    """Add the subscriptions that are new; `held` ones are not billed until they are armed.

    Idempotent by reference id: the same record again is `unchanged`, another one under a known
    reference is a `conflict` and changes nothing. The same is what made the subscription, or what
    `stored_records` says it is now.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return _subscribe(store, vault, clock.now(), records, by=by, dry_run=dry_run, held=held)
        except IntegrityError:
            if not tries_left:
                raise
    raise AssertionError("unreachable")


def _subscribe(
    store: Store,
    vault: Vault,
    now: datetime,
    records: Sequence[SubscriptionRecord],
    *,
    by: str,
    dry_run: bool,
    held: bool,
) -> Subscribed:
    with store.transaction() as connection:
        references = [record.reference_id for record in records]
        known = subscriptions.digests(connection, references)
        outcomes, new = _sorted_out(records, known)
        conflicts = _conflicts(connection, vault, records, outcomes)
        if not dry_run:
            _add(connection, vault, new, by, now, held=held)
    settled = [
        "unchanged" if outcome == "conflict" and not conflicts[position] else outcome
        for position, outcome in enumerate(outcomes)
    ]
    return Subscribed(
        tuple(settled), {position: found for position, found in conflicts.items() if found}
    )


def _sorted_out(
    records: Sequence[SubscriptionRecord], known: dict[str, str]
) -> tuple[list[str], list[SubscriptionRecord]]:
    outcomes: list[str] = []
    new: list[SubscriptionRecord] = []
    seen = dict(known)
    for record in records:
        if record.reference_id not in seen:
            seen[record.reference_id] = record.digest
            new.append(record)
            outcomes.append("added")
        elif seen[record.reference_id] == record.digest:
            outcomes.append("unchanged")
        else:
            outcomes.append("conflict")
    return outcomes, new


def _conflicts(
    connection: Connection,
    vault: Vault,
    records: Sequence[SubscriptionRecord],
    outcomes: Sequence[str],
) -> dict[int, tuple[Difference, ...]]:
    """By position: where a record differs from the one that is stored, or came before it."""
    positions = [n for n, outcome in enumerate(outcomes) if outcome == "conflict"]
    if not positions:
        return {}
    references = [records[n].reference_id for n in positions]
    first = {
        record.reference_id: record
        for record, outcome in zip(records, outcomes, strict=True)
        if outcome == "added"
    }
    stored = {row.reference_id: row for row in subscriptions.whole(connection, references)}
    return {
        n: _differences(stored.get(reference) or first[reference], records[n], vault)
        for n, reference in zip(positions, references, strict=True)
    }


def _differences(
    known: Row[Any] | SubscriptionRecord, given: SubscriptionRecord, vault: Vault
) -> tuple[Difference, ...]:
    if isinstance(known, SubscriptionRecord):
        return differences(known, given)
    if known.kind == ONE_OFF:
        return (Difference("reference_id", "a one-off charge", "a subscription"),)
    return differences(record_from(known, vault), given)


def _add(
    connection: Connection,
    vault: Vault,
    records: Sequence[SubscriptionRecord],
    by: str,
    now: datetime,
    *,
    held: bool,
) -> None:
    if not records:
        return
    people = [
        {"reference_id": c.reference_id, "name": c.name, "email": c.email}
        for c in (record.customer for record in records)
    ]
    customer_ids = customers.ids_for(connection, people, now)
    with_card = [(record, record.card) for record in records if record.card is not None]
    card_ids = customers.add_cards(
        connection,
        [
            card_row(vault, card, customer_ids[record.customer.reference_id], now)
            for record, card in with_card
        ],
    )
    card_of = {
        record.reference_id: card_id
        for (record, _), card_id in zip(with_card, card_ids, strict=True)
    }
    rows = [
        _row(record, customer_ids[record.customer.reference_id],
             card_of.get(record.reference_id), now, held=held)
        for record in records
    ]  # fmt: skip
    ids = subscriptions.add(connection, rows)
    history.write(
        connection,
        (
            Entry(Event(EventKind.SUBSCRIBED, now, by, _said(row)), subscription_id)
            for row, subscription_id in zip(rows, ids, strict=True)
        ),
    )


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


def _row(
    record: SubscriptionRecord,
    customer_id: int,
    card_id: int | None,
    now: datetime,
    *,
    held: bool,
) -> dict[str, Any]:
    schedule, first = record.schedule, record.first_period
    ended = record.ends_after_periods is not None and first >= record.ends_after_periods
    starts_at = schedule.boundary(first)
    status = SubscriptionStatus.ACTIVE
    if ended:
        status = SubscriptionStatus.ENDED
    elif record.trial_end is not None and now < record.trial_end:
        status = SubscriptionStatus.TRIALING
    return {
        "reference_id": record.reference_id,
        "customer_id": customer_id,
        "card_id": card_id,
        "status": status,
        "amount_minor": record.money.minor,
        "currency": record.money.currency,
        "interval": schedule.unit,
        "interval_count": schedule.count,
        "anchor_at": schedule.anchor,
        "timezone": schedule.tz,
        "ends_after_periods": record.ends_after_periods,
        "next_period": first,
        "next_billing_at": None if ended or held else starts_at,
        "description": record.description,
        "metadata": record.metadata,
        "record_digest": record.digest,
        "created_at": now,
        "held": held and not ended,
        "trial_end": record.trial_end,
        "paid_through": record.paid_through,
    }


def _said(row: dict[str, Any]) -> dict[str, Any]:
    next_at = row["next_billing_at"]
    return {
        "status": row["status"],
        "held": row["held"],
        "first_period": row["next_period"],
        "next_billing_at": next_at.isoformat() if next_at else None,
    }
