"""The last result of each event at each endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, func, select
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.schema.outgoing import deliveries, public_events, webhook_endpoints


def record(
    connection: Connection,
    endpoint_id: int,
    tries: Sequence[tuple[int, int | None, str | None]],
    now: datetime,
) -> None:
    """Record ended tries: (event number, HTTP status, reason of the failure or None)."""
    if not tries:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(deliveries)
    given = statement.excluded
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["endpoint_id", "number"],
            set_={
                "tries": deliveries.c.tries + 1,
                "last_at": given.last_at,
                "status": given.status,
                "reason": given.reason,
                "delivered_at": func.coalesce(given.delivered_at, deliveries.c.delivered_at),
            },
        ),
        [
            {"endpoint_id": endpoint_id, "number": number, "tries": 1, "first_at": now,
             "last_at": now, "status": status, "reason": reason,
             "delivered_at": None if reason else now}
            for number, status, reason in sorted(tries, key=lambda one: one[0])
        ],
    )  # fmt: skip


def listed(
    connection: Connection, *, failed: bool, endpoint_id: int | None, limit: int
) -> Sequence[Row[Any]]:
    """Return the newest tries first. `failed`: only events that are not delivered."""
    c = deliveries.c
    query = (
        select(
            deliveries,
            webhook_endpoints.c.url,
            public_events.c.event_id,
            public_events.c.type,
        )
        .join(webhook_endpoints, webhook_endpoints.c.id == c.endpoint_id)
        .join(public_events, public_events.c.number == c.number, isouter=True)
        .order_by(c.last_at.desc(), c.number.desc())
        .limit(limit)
    )
    if failed:
        query = query.where(c.reason.is_not(None))
    if endpoint_id is not None:
        query = query.where(c.endpoint_id == endpoint_id)
    return connection.execute(query).all()
