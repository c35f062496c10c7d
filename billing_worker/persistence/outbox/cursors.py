"""The position of each endpoint in each stream: what is due, what follows, and what waits.

The publisher points idle cursors at new events; the sender moves them. Both lock rows in the order
of (endpoint, stream), so they never deadlock, and each reads after it has the lock, so neither
misses the other's changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    exists,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.outbox.endpoints import ACTIVE, Endpoint
from billing_worker.persistence.schema.outgoing import (
    public_events,
    webhook_cursors,
    webhook_endpoints,
)

_C = webhook_cursors.c


@dataclass(frozen=True, slots=True)
class Due:
    """One event that is due for an endpoint, under a claim."""

    stream: int
    sequence: int
    claim: int
    tries: int
    number: int
    event_id: str
    body: str = field(repr=False)


def point(
    connection: Connection,
    endpoints: Sequence[Endpoint],
    events: Sequence[Mapping[str, Any]],
    now: datetime,
) -> None:
    """Point each idle cursor at the first of these new events that its endpoint wants."""
    first: dict[tuple[int, int], int] = {}
    for endpoint in endpoints:
        for event in events:
            if endpoint.wants(event["type"]):
                first.setdefault((endpoint.id, event["stream"]), event["sequence"])
    if not first:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(webhook_cursors)
    fresh = {"head": statement.excluded.head, "next_at": statement.excluded.next_at, "tries": 0}
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["endpoint_id", "stream"], set_=fresh, where=_C.head.is_(None)
        ),
        [
            {"endpoint_id": endpoint_id, "stream": stream, "head": head, "next_at": now,
             "tries": 0, "claim": 0}
            for (endpoint_id, stream), head in sorted(first.items())
        ],
    )  # fmt: skip


def make(connection: Connection, endpoint_id: int, streams: Collection[int]) -> None:
    """Create missing cursors, idle."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    idle = {"endpoint_id": endpoint_id, "tries": 0, "claim": 0}
    connection.execute(
        dialect.insert(webhook_cursors).on_conflict_do_nothing(),
        [idle | {"stream": stream} for stream in sorted(streams)],
    )


_NOW = bindparam("now", type_=_C.next_at.type)
_DUE_ENDPOINTS = select(webhook_endpoints.c.id).where(
    webhook_endpoints.c.status == ACTIVE,
    # Not a join: a dead endpoint may have a hundred thousand due cursors.
    exists().where(_C.endpoint_id == webhook_endpoints.c.id, _C.next_at <= _NOW),
)


def endpoints_due(connection: Connection, now: datetime) -> list[int]:
    return list(connection.execute(_DUE_ENDPOINTS, {"now": now}).scalars())


_DUE: Select[Any] = (
    select(
        _C.stream,
        _C.head,
        _C.claim,
        _C.tries,
        public_events.c.number,
        public_events.c.event_id,
        public_events.c.body,
    )
    .join(
        public_events,
        and_(public_events.c.stream == _C.stream, public_events.c.sequence == _C.head),
    )
    .where(_C.endpoint_id == bindparam("endpoint"), _C.next_at <= _NOW)
    .order_by(_C.next_at, _C.stream)
    .limit(bindparam("most"))
    .with_for_update(of=webhook_cursors, skip_locked=True)
)
_THESE: Any = bindparam("streams", expanding=True)


def claim(
    connection: Connection, endpoint_id: int, now: datetime, until: datetime, limit: int
) -> list[Due]:
    """Claim up to `limit` due events until `until`. After a crash the next sender takes them then,
    and reports of the older claim are ignored.
    """
    rows = connection.execute(_DUE, {"endpoint": endpoint_id, "now": now, "most": limit}).all()
    if rows:
        connection.execute(
            update(webhook_cursors)
            .where(_C.endpoint_id == endpoint_id, _C.stream.in_([row.stream for row in rows]))
            .values(claim=_C.claim + 1, next_at=until)
        )
    return [
        Due(row.stream, row.head, row.claim + 1, row.tries, row.number, row.event_id, row.body)
        for row in rows
    ]


def lock(connection: Connection, endpoint_id: int, streams: Collection[int]) -> dict[int, Row[Any]]:
    """Lock the cursors of these streams in order. Returns them by stream."""
    query = (
        select(webhook_cursors)
        .where(_C.endpoint_id == endpoint_id, _C.stream.in_(streams))
        .order_by(_C.stream)
        .with_for_update()
    )
    return {row.stream: row for row in connection.execute(query)}


def following(
    connection: Connection, endpoint: Endpoint, streams: Collection[int]
) -> dict[int, int]:
    """Return by stream the sequence of the next event that the endpoint wants, if any. The cursors
    are locked.
    """
    wanted: ColumnElement[bool] = true()
    if endpoint.types is not None:
        wanted = public_events.c.type.in_(sorted(endpoint.types))
    in_replay_or_after = or_(
        _C.replay_until.is_(None),
        public_events.c.sequence <= _C.replay_until,
        public_events.c.sequence >= _C.resume_at,
    )
    query = (
        select(public_events.c.stream, func.min(public_events.c.sequence).label("sequence"))
        .join(webhook_cursors, _C.stream == public_events.c.stream)
        .where(
            _C.endpoint_id == endpoint.id,
            _C.stream.in_(streams),
            public_events.c.sequence > _C.head,
            in_replay_or_after,
            wanted,
        )
        .group_by(public_events.c.stream)
    )
    return {row.stream: row.sequence for row in connection.execute(query)}


_MOVE = (
    update(webhook_cursors)
    .where(_C.endpoint_id == bindparam("of_endpoint"), _C.stream == bindparam("of_stream"))
    .values(
        head=bindparam("head"),
        next_at=bindparam("next_at", type_=_C.next_at.type),
        tries=bindparam("tries"),
        parked_at=bindparam("parked_at", type_=_C.parked_at.type),
        replay_until=bindparam("replay_until"),
        resume_at=bindparam("resume_at"),
    )
)


def move(connection: Connection, endpoint_id: int, moves: Mapping[int, Mapping[str, Any]]) -> None:
    """Write locked cursors, by stream: head, next_at, tries, parked_at, replay_until, resume_at."""
    if moves:
        connection.execute(
            _MOVE,
            [
                {"of_endpoint": endpoint_id, "of_stream": stream, **moves[stream]}
                for stream in sorted(moves)
            ],
        )


def try_parked_now(connection: Connection, endpoint_id: int, now: datetime) -> int:
    """Start a new schedule for parked streams. Returns how many."""
    result = connection.execute(
        update(webhook_cursors)
        .where(_C.endpoint_id == endpoint_id, _C.parked_at.is_not(None))
        .values(next_at=now, tries=0, parked_at=None)
    )
    return result.rowcount


def has_parked(connection: Connection, endpoint_id: int) -> bool:
    query = select(exists().where(_C.endpoint_id == endpoint_id, _C.parked_at.is_not(None)))
    return bool(connection.execute(query).scalar())


def backlog(connection: Connection) -> dict[int, tuple[int, int]]:
    """Return by endpoint how many streams wait, and how many of them are parked."""
    query = select(
        _C.endpoint_id,
        func.count(_C.next_at).label("waiting"),
        func.count(_C.parked_at).label("parked"),
    ).group_by(_C.endpoint_id)
    return {row.endpoint_id: (row.waiting, row.parked) for row in connection.execute(query)}


def ranges(
    connection: Connection, endpoint: Endpoint, first: int, last: int
) -> dict[int, tuple[int, int]]:
    """Return by stream the first and last sequence of a range of events that the endpoint wants."""
    c = public_events.c
    query = select(
        c.stream, func.min(c.sequence).label("first"), func.max(c.sequence).label("last")
    ).where(c.number >= first, c.number <= last)
    if endpoint.types is not None:
        query = query.where(c.type.in_(sorted(endpoint.types)))
    rows = connection.execute(query.group_by(c.stream))
    return {row.stream: (row.first, row.last) for row in rows}
