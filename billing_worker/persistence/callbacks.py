"""Callbacks as received, and the rows that they cause to be polled."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, select, update
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.schema.tables import attempts, callbacks, card_setups, invoices


def keep(
    connection: Connection, *, gateway_id: str, digest: str, body: bytes, now: datetime
) -> bool:
    """Store the callback with its body encrypted. Return False if the same bytes are already
    stored.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = (
        dialect.insert(callbacks)
        .values(gateway_id=gateway_id, digest=digest, body=body, received_at=now)
        .on_conflict_do_nothing(index_elements=["digest"])
        .returning(callbacks.c.id)
    )
    return connection.execute(statement).first() is not None


def poll_now(
    connection: Connection, gateway_id: str, now: datetime, *, reference: str | None = None
) -> CaseKey | None:
    """Make rows with this gateway id due for polling. Return the attempt among them.

    Where no attempt has the id, one with this reference may: what was withdrawn before it was sold
    has none, and is polled by its reference. A prepared attempt is left alone: the worker that
    prepares it polls by itself.
    """
    moved = _poll_attempt(connection, attempts.c.gateway_id == gateway_id, now)
    if moved is None and reference is not None:
        nameless = and_(attempts.c.reference_id == reference, attempts.c.gateway_id.is_(None))
        moved = _poll_attempt(connection, nameless, now)
    connection.execute(
        update(card_setups)
        .where(card_setups.c.gateway_id == gateway_id, card_setups.c.status != "prepared")
        .values(next_poll_at=_not_later(card_setups.c.next_poll_at, now))
    )
    return moved


def _not_later(next_poll_at: ColumnElement[Any], now: datetime) -> ColumnElement[Any]:
    """The clock of the web process may be ahead of the worker's: a callback postpones nothing."""
    return case((next_poll_at < now, next_poll_at), else_=now)


def _poll_attempt(
    connection: Connection, which: ColumnElement[bool], now: datetime
) -> CaseKey | None:
    moved = connection.execute(
        update(attempts)
        .where(which, attempts.c.status != "prepared")
        .values(next_poll_at=_not_later(attempts.c.next_poll_at, now))
        .returning(attempts.c.id, attempts.c.invoice_id)
    ).first()
    if moved is None:
        return None
    owner = select(invoices.c.subscription_id).where(invoices.c.id == moved.invoice_id)
    return CaseKey(connection.execute(owner).scalar_one(), moved.invoice_id, moved.id)
