"""Outbox entries: written in the transaction of the fact, removed when they get a number."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, exists, select, update

from billing_worker.domain.public_events import Told
from billing_worker.persistence.bulk import insert_many
from billing_worker.persistence.schema.outgoing import outbox

NO_SUBSCRIPTION = 0
"""The stream of events about no subscription."""


def add(connection: Connection, facts: Sequence[tuple[Told, int | None, int | None]]) -> None:
    """Insert entries with the ids of their subscription and invoice, if any.

    One statement for the whole transaction, without queries or locks.
    """
    insert_many(
        connection,
        outbox,
        [
            {
                "at": told.at,
                "type": told.type,
                "stream": subscription_id or NO_SUBSCRIPTION,
                "invoice_id": invoice_id,
                "details": dict(told.details),
            }
            for told, subscription_id, invoice_id in facts
        ],
    )


_NOW = bindparam("now", type_=outbox.c.again_at.type)
_HELD_BACK = select(outbox.c.stream).where(outbox.c.again_at > _NOW)
_WAITING = (
    select(outbox)
    .where(outbox.c.stream.not_in(_HELD_BACK))
    .order_by(outbox.c.id)
    .limit(bindparam("most"))
)


def waiting(connection: Connection, now: datetime, limit: int) -> Sequence[Row[Any]]:
    """Return entries without a number, in the order of writing, without streams that are
    held back.
    """
    return connection.execute(_WAITING, {"now": now, "most": limit}).all()


def is_empty(connection: Connection) -> bool:
    return not connection.execute(select(exists().select_from(outbox))).scalar()


def remove(connection: Connection, ids: Sequence[int]) -> None:
    connection.execute(delete(outbox).where(outbox.c.id.in_(ids)))


def put_off(connection: Connection, row_id: int, why: str, until: datetime) -> None:
    connection.execute(
        update(outbox).where(outbox.c.id == row_id).values(trouble=why, again_at=until)
    )


def in_trouble(connection: Connection, limit: int) -> Sequence[Row[Any]]:
    """Return entries that could not be rendered, oldest first."""
    query = select(outbox).where(outbox.c.trouble.is_not(None)).order_by(outbox.c.id).limit(limit)
    return connection.execute(query).all()
