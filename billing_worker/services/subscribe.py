"""Records become subscriptions: in batches, each reference once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.subscription import SubscriptionStatus
from billing_worker.persistence import customers, history, subscriptions
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.ports import Vault
from billing_worker.services.records import SubscriptionRecord


@dataclass(frozen=True, slots=True)
class Subscribed:
    """What became of each record of a batch, in order: added, unchanged or conflict."""

    outcomes: tuple[str, ...]


def subscribe(
    store: Store,
    vault: Vault,
    clock: Clock,
    records: Sequence[SubscriptionRecord],
    *,
    by: str,
    dry_run: bool = False,
) -> Subscribed:
    """Add the subscriptions that are new.

    Idempotent by reference id: the same record again is `unchanged`, another one under a known
    reference is a `conflict` and changes nothing.
    """
    now = clock.now()
    with store.transaction() as connection:
        known = subscriptions.digests(connection, [record.reference_id for record in records])
        outcomes, new = _sorted_out(records, known)
        if not dry_run:
            _add(connection, vault, new, by, now)
    return Subscribed(tuple(outcomes))


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


def _add(
    connection: Connection,
    vault: Vault,
    records: Sequence[SubscriptionRecord],
    by: str,
    now: datetime,
) -> None:
    if not records:
        return
    people = [
        {"reference_id": c.reference_id, "name": c.name, "email": c.email}
        for c in (record.customer for record in records)
    ]
    customer_ids = customers.ids_for(connection, people, now)
    with_card = [record for record in records if record.card is not None]
    card_ids = customers.add_cards(
        connection, [_card_row(vault, record, customer_ids, now) for record in with_card]
    )
    card_of = {
        record.reference_id: card_id for record, card_id in zip(with_card, card_ids, strict=True)
    }
    rows = [
        _row(record, customer_ids[record.customer.reference_id],
             card_of.get(record.reference_id), now)
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


def _card_row(
    vault: Vault, record: SubscriptionRecord, customer_ids: dict[str, int], now: datetime
) -> dict[str, Any]:
    card = record.card
    assert card is not None  # noqa: S101 - the caller has chosen those with a card; tells mypy
    return {
        "customer_id": customer_ids[record.customer.reference_id],
        "token": vault.lock(card.token),
        "mask": card.mask,
        "brand": card.brand,
        "expiry_month": card.expiry_month,
        "expiry_year": card.expiry_year,
        "created_at": now,
    }


def _row(
    record: SubscriptionRecord, customer_id: int, card_id: int | None, now: datetime
) -> dict[str, Any]:
    schedule = record.schedule
    first = schedule.first_period_from(record.paid_through) if record.paid_through else 0
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
        "next_billing_at": None if ended else starts_at,
        "description": record.description,
        "metadata": record.metadata,
        "record_digest": record.digest,
        "created_at": now,
    }


def _said(row: dict[str, Any]) -> dict[str, Any]:
    next_at = row["next_billing_at"]
    return {
        "status": row["status"],
        "first_period": row["next_period"],
        "next_billing_at": next_at.isoformat() if next_at else None,
    }
