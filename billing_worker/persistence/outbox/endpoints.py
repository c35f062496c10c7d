"""The endpoints of webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, insert, select, update

from billing_worker.persistence.schema.outgoing import (
    deliveries,
    webhook_cursors,
    webhook_endpoints,
)

ACTIVE, PAUSED = "active", "paused"


@dataclass(frozen=True, slots=True)
class Endpoint:
    id: int
    url: str
    types: frozenset[str] | None  # None: all
    status: str
    reason: str | None
    created_at: datetime
    secret: bytes = field(repr=False)  # encrypted, as is the next one
    old_secret: bytes | None = field(repr=False)
    old_until: datetime | None

    def wants(self, event_type: str) -> bool:
        return self.types is None or event_type in self.types


def _from(row: Row[Any]) -> Endpoint:
    return Endpoint(
        id=row.id,
        url=row.url,
        types=frozenset(row.types.split(",")) if row.types else None,
        status=row.status,
        reason=row.reason,
        created_at=row.created_at,
        secret=row.secret,
        old_secret=row.old_secret,
        old_until=row.old_until,
    )


def add(
    connection: Connection, url: str, types: Sequence[str] | None, secret: bytes, now: datetime
) -> int | None:
    """Insert an endpoint. Returns its id, or None if the URL exists."""
    if connection.execute(select(exists().where(webhook_endpoints.c.url == url))).scalar():
        return None
    row = {"url": url, "types": ",".join(types) if types else None, "secret": secret}
    statement = insert(webhook_endpoints).values(row | {"status": ACTIVE, "created_at": now})
    key: int = connection.execute(statement.returning(webhook_endpoints.c.id)).scalar_one()
    return key


def listed(connection: Connection) -> list[Endpoint]:
    rows = connection.execute(select(webhook_endpoints).order_by(webhook_endpoints.c.id))
    return [_from(row) for row in rows]


def find(connection: Connection, endpoint_id: int) -> Endpoint | None:
    query = select(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else _from(row)


def set_status(connection: Connection, endpoint_id: int, status: str, reason: str | None) -> None:
    connection.execute(
        update(webhook_endpoints)
        .where(webhook_endpoints.c.id == endpoint_id)
        .values(status=status, reason=reason)
    )


def set_secret(
    connection: Connection, endpoint: Endpoint, secret: bytes, old_until: datetime
) -> None:
    connection.execute(
        update(webhook_endpoints)
        .where(webhook_endpoints.c.id == endpoint.id)
        .values(secret=secret, old_secret=endpoint.secret, old_until=old_until)
    )


def remove(connection: Connection, endpoint_id: int) -> None:
    """Delete an endpoint and its waiting deliveries."""
    for table in (deliveries, webhook_cursors):
        connection.execute(delete(table).where(table.c.endpoint_id == endpoint_id))
    connection.execute(delete(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id))
