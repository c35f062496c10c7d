"""Gives each outbox entry its number, its sequence in its subscription, and its body.

One writer at a time numbers the committed entries and commits. A reader that sees a number
therefore sees all smaller ones. A database sequence cannot promise that, because its numbers are
taken before the commit.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import Connection, Row

from billing_worker.clock import Clock
from billing_worker.domain.public_events import Numbered, PublicType, Told, body, refuse_large
from billing_worker.persistence import switches
from billing_worker.persistence.outbox import cursors, endpoints, feed, pending, states
from billing_worker.persistence.outbox.feed import Place
from billing_worker.persistence.store import Store
from billing_worker.services.outbox.states import invoice_state, subscription_state

PUBLISH_BATCH = 500
"""Entries that one transaction numbers. It holds no lock that a charge needs."""

PUBLISH_AGAIN_AFTER = timedelta(minutes=10)
"""Time until an event that could not be rendered is tried again. It holds back its own
stream only.
"""

log = structlog.get_logger()


def publish(store: Store, clock: Clock, how_to_cancel: str | None = None) -> int:
    """Number all committed entries. Returns how many events were published.

    `how_to_cancel`: what the merchant tells customers about it.
    """
    with store.reading() as connection:  # each second, and mostly there is nothing: no lock
        if pending.is_empty(connection):
            return 0
    published = 0
    while True:
        with store.transaction() as connection:
            taken, done = _publish_batch(connection, clock.now(), how_to_cancel)
        published += done
        if taken < PUBLISH_BATCH:
            return published


def _publish_batch(
    connection: Connection, now: datetime, how_to_cancel: str | None
) -> tuple[int, int]:
    place = feed.lock(connection)
    restored_at = switches.restored_at(connection)
    if restored_at is not None and restored_at != place.restored_at:
        place = feed.jump(connection, place, restored_at)
    facts = pending.waiting(connection, now, PUBLISH_BATCH)
    if not facts:
        return 0, 0
    rendered = _Batch(connection, facts, place, now, how_to_cancel).rendered()
    if rendered:
        rows = [row for _, row in rendered]
        feed.publish(connection, rows)
        cursors.point(connection, endpoints.listed(connection), rows, now)
        pending.remove(connection, [fact_id for fact_id, _ in rendered])
    return len(facts), len(rendered)


@dataclass(slots=True)
class _Batch:
    connection: Connection
    facts: Sequence[Row[Any]]
    place: Place
    now: datetime
    how_to_cancel: str | None

    def rendered(self) -> list[tuple[int, dict[str, Any]]]:
        """Return (id of the entry, row of the event), without streams that are held back."""
        streams = {fact.stream for fact in self.facts}
        sequences = feed.last_sequences(self.connection, streams)
        current = _Current(self.connection, self.facts)
        number, floor = self.place.number, self.place.floor
        done: list[tuple[int, dict[str, Any]]] = []
        stuck: set[int] = set()
        for fact in self.facts:
            if fact.stream in stuck:
                continue
            place = number + 1, max(sequences.get(fact.stream, 0), floor) + 1
            try:
                row = _row(fact, place, current.of(fact), self.now, self.how_to_cancel)
            except Exception as error:  # noqa: BLE001 - kept and shown; others must not wait for it
                stuck.add(fact.stream)
                self._tell_trouble(fact, error)
                continue
            number, sequences[fact.stream] = place
            done.append((fact.id, row))
        return done

    def _tell_trouble(self, fact: Row[Any], error: Exception) -> None:
        why = f"{type(error).__name__}: {error}"
        if fact.trouble is None:
            log.error("billing.alert", kind="event.not_rendered", type=fact.type, reason=why)
        pending.put_off(self.connection, fact.id, why, self.now + PUBLISH_AGAIN_AFTER)


class _Current:
    """The states of all objects of a batch, read once, after its entries."""

    def __init__(self, connection: Connection, facts: Sequence[Row[Any]]) -> None:
        ids = {fact.stream for fact in facts if fact.stream != pending.NO_SUBSCRIPTION}
        invoice_ids = {fact.invoice_id for fact in facts if fact.invoice_id is not None}
        self._subscriptions = states.of_subscriptions(connection, ids) if ids else {}
        self._invoices = states.of_invoices(connection, invoice_ids) if invoice_ids else {}

    def of(self, fact: Row[Any]) -> Mapping[str, Any]:
        subscription = self._subscriptions.get(fact.stream)
        invoice = self._invoices.get(fact.invoice_id)
        return {
            "customer": subscription.customer_reference if subscription else None,
            "subscription": subscription_state(subscription) if subscription else None,
            "invoice": invoice_state(invoice) if invoice else None,
        }


def _row(
    fact: Row[Any],
    place: tuple[int, int],
    state: Mapping[str, Any],
    now: datetime,
    how_to_cancel: str | None,
) -> dict[str, Any]:
    number, sequence = place
    told = Told(PublicType(fact.type), fact.at, fact.details)
    # Random: after a restore numbers are used again, and a receiver that drops repeated ids must
    # not drop another event.
    event = Numbered(f"evt_{uuid.uuid4().hex}", told, number, sequence)
    text = json.dumps(body(event, state, how_to_cancel), ensure_ascii=False, separators=(",", ":"))
    return {
        "number": number,
        "event_id": event.id,
        "type": fact.type,
        "at": fact.at,
        "stream": fact.stream,
        "sequence": sequence,
        "body": refuse_large(text),
        "published_at": now,
    }
