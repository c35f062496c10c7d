"""Attempts that a customer makes on the gateway's page: they take an invoice's one slot."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, select, update

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.errors import ConcurrentChange
from billing_worker.persistence import claims
from billing_worker.persistence.cases import CaseKey
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.tables import attempts, invoices


def prepare(
    connection: Connection,
    item: DueInvoice,
    *,
    test_mode: bool,
    now: datetime,
    lapses_at: datetime,
) -> Attempt:
    """Take the slot of a locked invoice. When the lease lapses, the sweep of looks comes by."""
    [attempt] = claims.prepare(
        connection, [(item, Origin.LINK)], test_mode=test_mode, now=now, lease_until=lapses_at
    )
    _watch(connection, attempt.id, lapses_at)
    return attempt


def take_over(connection: Connection, attempt: Attempt, lapses_at: datetime) -> Attempt:
    """Continue a prepared link for a newer caller: the older one can no longer hand it out."""
    [taken] = claims.take_over(connection, [(attempt, lapses_at)])
    _watch(connection, attempt.id, lapses_at)
    return taken


def _watch(connection: Connection, attempt_id: int, lapses_at: datetime) -> None:
    connection.execute(
        update(attempts).where(attempts.c.id == attempt_id).values(look_at=lapses_at)
    )


def open_page(
    connection: Connection,
    attempt: Attempt,
    *,
    gateway_id: str,
    page: bytes,
    now: datetime,
    look_at: datetime,
) -> None:
    """Prepared -> submitted under the fence: from here on the customer may pay at any time.

    The invoice keeps its next step, for when nobody pays; nobody is rung for it meanwhile.
    Raises ConcurrentChange when the attempt is no longer the caller's.
    """
    moved = connection.execute(
        update(attempts)
        .where(
            attempts.c.id == attempt.id,
            attempts.c.fence == attempt.fence,
            attempts.c.status == AttemptStatus.PREPARED,
            attempts.c.origin == Origin.LINK,
        )
        .values(
            status=AttemptStatus.SUBMITTED,
            gateway_id=gateway_id,
            page=page,
            submitted_at=now,
            look_at=look_at,
        )
    )
    held = connection.execute(
        update(invoices)
        .where(invoices.c.id == attempt.invoice_id, invoices.c.status == "open")
        .values(ring_at=None)
    )
    if moved.rowcount != 1 or held.rowcount != 1:
        raise ConcurrentChange("the link or its invoice moved before it was handed out")


def page_of(connection: Connection, attempt_id: int) -> bytes | None:
    """The encrypted page while the customer may pay there; None: paid, ended or released."""
    query = (
        select(attempts.c.page)
        .join(invoices, invoices.c.id == attempts.c.invoice_id)
        .where(
            attempts.c.id == attempt_id,
            attempts.c.status == AttemptStatus.SUBMITTED,
            attempts.c.unpaid_since.is_(None),
            invoices.c.status == "open",
        )
    )
    return connection.execute(query).scalar()


def lapsed(connection: Connection, attempt_ids: Sequence[int], now: datetime) -> list[CaseKey]:
    """Those of the attempts that are prepared links whose caller has gone away."""
    query = (
        select(attempts.c.id, attempts.c.invoice_id, invoices.c.subscription_id)
        .join(invoices, invoices.c.id == attempts.c.invoice_id)
        .where(
            attempts.c.id.in_(attempt_ids),
            attempts.c.origin == Origin.LINK,
            attempts.c.status == AttemptStatus.PREPARED,
            attempts.c.lease_until <= now,
        )
        .order_by(attempts.c.id)
    )
    return [
        CaseKey(row.subscription_id, row.invoice_id, row.id) for row in connection.execute(query)
    ]
