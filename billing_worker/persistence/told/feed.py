"""The feed: numbered events, readable from any number on without a gap."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, select, update
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.bulk import insert_many
from billing_worker.persistence.schema.tables import feed, public_events, streams


def lock(connection: Connection) -> int:
    """The right to give out numbers until the end of the transaction, and the last one given out.

    Whoever waits here reads the outbox afterwards, and so sees what the one before has taken. A
    number is visible only with all that are smaller: they are committed with it, or before it.
    """
    number: int = connection.execute(select(feed.c.number).with_for_update()).scalar_one()
    return number


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
    """(number, body) of up to `limit` events that come after `number`, in their order."""
    return connection.execute(_AFTER, {"after": number, "most": limit}).all()


def newest(connection: Connection) -> int:
    """The last number that was given out; 0: none."""
    number: int = connection.execute(select(feed.c.number)).scalar_one()
    return number


def number_of(connection: Connection, event_id: str) -> int | None:
    query = select(public_events.c.number).where(public_events.c.event_id == event_id)
    return connection.execute(query).scalar()
