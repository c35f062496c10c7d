"""The feed: numbered events, readable from any number on without a gap."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, delete, exists, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.bulk import insert_many
from billing_worker.persistence.schema.outgoing import (
    deliveries,
    feed,
    public_events,
    streams,
    webhook_cursors,
)

JUMP = 1_000_000
"""More events than a book publishes between a backup and its restore."""


@dataclass(frozen=True, slots=True)
class Place:
    """The state of the feed, for the holder of its lock."""

    number: int  # the last used number
    floor: int  # sequences begin above it
    restored_at: datetime | None


def lock(connection: Connection) -> Place:
    """Lock the feed: only this transaction assigns numbers until it ends.

    The next holder reads the outbox after it has the lock, and so sees what this one has taken. A
    number is visible only together with all smaller ones, which are committed with it or before it.
    """
    query = select(feed.c.number, feed.c.floor, feed.c.restored_at).with_for_update()
    return Place(*connection.execute(query).one())


def jump(connection: Connection, place: Place, restored_at: datetime) -> Place:
    """Skip the numbers and sequences that may have been used in the lost time: a reader that has
    seen them would miss the new events.
    """
    number = place.number + JUMP
    values = {"number": number, "floor": number, "restored_at": restored_at}
    connection.execute(update(feed).values(values))
    return Place(number, number, restored_at)


def last_sequences(connection: Connection, of: Collection[int]) -> dict[int, int]:
    query = select(streams.c.stream, streams.c.sequence).where(streams.c.stream.in_(of))
    return {row.stream: row.sequence for row in connection.execute(query)}


def publish(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Write numbered events, ordered by number, while the lock is held."""
    insert_many(connection, public_events, rows)
    newest = {row["stream"]: row["sequence"] for row in rows}
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(streams)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["stream"], set_={"sequence": statement.excluded.sequence}
        ),
        [{"stream": stream, "sequence": newest[stream]} for stream in sorted(newest)],
    )
    connection.execute(update(feed).values(number=rows[-1]["number"]))


_AFTER: Select[Any] = (
    select(public_events.c.number, public_events.c.body)
    .where(public_events.c.number > bindparam("after"))
    .order_by(public_events.c.number)
    .limit(bindparam("most"))
)


def after(connection: Connection, number: int, limit: int) -> Sequence[Row[Any]]:
    """Return (number, body) of up to `limit` events after `number`, in order."""
    return connection.execute(_AFTER, {"after": number, "most": limit}).all()


def newest(connection: Connection) -> int:
    """Return the last used number, or 0."""
    number: int = connection.execute(select(feed.c.number)).scalar_one()
    return number


def number_of(connection: Connection, event_id: str) -> int | None:
    query = select(public_events.c.number).where(public_events.c.event_id == event_id)
    return connection.execute(query).scalar()


def forgotten(connection: Connection) -> int:
    """Return the last deleted number, or 0."""
    number: int = connection.execute(select(feed.c.forgotten)).scalar_one()
    return number


_STILL_TO_SEND = exists().where(
    webhook_cursors.c.stream == public_events.c.stream,
    webhook_cursors.c.head <= public_events.c.sequence,
)


def forget(connection: Connection, before: datetime, limit: int) -> int:
    """Delete up to `limit` events that were published before then. Keeps what an endpoint or the
    queue still needs. Returns how many.
    """
    lock(connection)
    is_queued = select(feed.c.queued).where(
        or_(feed.c.queued.is_(None), feed.c.queued >= public_events.c.number)
    )
    c = public_events.c
    query = (
        select(c.number)
        .where(c.published_at < before, ~_STILL_TO_SEND, is_queued.exists())
        .order_by(c.number)
        .limit(limit)
    )
    numbers = list(connection.execute(query).scalars())
    if numbers:
        connection.execute(delete(deliveries).where(deliveries.c.number.in_(numbers)))
        connection.execute(delete(public_events).where(c.number.in_(numbers)))
        connection.execute(
            update(feed).where(feed.c.forgotten < numbers[-1]).values(forgotten=numbers[-1])
        )
    return len(numbers)


# --- the queue of other systems ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    after: int  # the last number that was sent
    claim: int


def claim_queue(connection: Connection, now: datetime, until: datetime) -> Queued | None:
    """Claim the right to send new events to the queue. None: another process has it."""
    row = connection.execute(select(feed).with_for_update()).one()
    if row.queue_lease_until is not None and row.queue_lease_until > now:
        return None
    sent = row.number if row.queued is None else row.queued
    values = {"queued": sent, "queue_claim": row.queue_claim + 1, "queue_lease_until": until}
    connection.execute(update(feed).values(values))
    return Queued(sent, row.queue_claim + 1)


def queued(connection: Connection, claimed: Queued, number: int) -> None:
    """Record that events up to this number are sent. Has no effect after another process
    took over.
    """
    connection.execute(
        update(feed)
        .where(feed.c.queue_claim == claimed.claim)
        .values(queued=number, queue_lease_until=None)
    )
