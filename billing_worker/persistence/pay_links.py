"""Pay links: attempts that a customer makes on the gateway's page. Each takes the invoice slot."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    exists,
    literal_column,
    or_,
    select,
    update,
)

from billing_worker.domain.attempt import PAID, Attempt, AttemptStatus, Origin
from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.invoice import OWED, InvoiceStatus
from billing_worker.domain.subscription import PAYABLE, PAYABLE_DEBT
from billing_worker.persistence import claims
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.rows import attempt_from
from billing_worker.persistence.schema.tables import attempts, invoices, subscriptions, switches
from billing_worker.persistence.switches import SALES


def prepare(
    connection: Connection,
    item: DueInvoice,
    *,
    test_mode: bool,
    now: datetime,
    lapses_at: datetime,
) -> Attempt:
    """Take the slot of a locked invoice. The poll sweep looks at the attempt when the lease
    expires.
    """
    [attempt] = claims.prepare(
        connection, [(item, Origin.LINK)], test_mode=test_mode, now=now, lease_until=lapses_at
    )
    _watch(connection, attempt.id, lapses_at)
    return attempt


def take_over(connection: Connection, attempt: Attempt, lapses_at: datetime) -> Attempt:
    """Take over a prepared link for a newer caller. The older caller can no longer hand the page
    out.
    """
    [taken] = claims.take_over(connection, [(attempt, lapses_at)])
    _watch(connection, attempt.id, lapses_at)
    return taken


def _watch(connection: Connection, attempt_id: int, lapses_at: datetime) -> None:
    connection.execute(
        update(attempts).where(attempts.c.id == attempt_id).values(next_poll_at=lapses_at)
    )


def open_page(
    connection: Connection,
    attempt: Attempt,
    *,
    gateway_id: str,
    page: bytes,
    page_digest: str | None,
    now: datetime,
    next_poll_at: datetime,
) -> None:
    """Move it from prepared to submitted under the fence. From then on the customer may pay at any
    time.

    The invoice keeps its next step in case the page stays unpaid, and no worker is woken for it
    meanwhile. Raises ConcurrentChange if another caller has taken over.
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
            page_digest=page_digest,
            submitted_at=now,
            next_poll_at=next_poll_at,
        )
    )
    held = connection.execute(
        update(invoices)
        .where(invoices.c.id == attempt.invoice_id, invoices.c.status.in_(sorted(OWED)))
        .values(enqueue_at=None)
    )
    if moved.rowcount != 1 or held.rowcount != 1:
        raise ConcurrentChange("the link or its invoice moved before it was handed out")


_undecided = attempts.alias("undecided")
_PAYABLE = (
    select(attempts.c.page)
    .join(invoices, invoices.c.id == attempts.c.invoice_id)
    .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
    .where(
        attempts.c.status == AttemptStatus.SUBMITTED,
        attempts.c.unpaid_since.is_(None),
        or_(
            and_(invoices.c.status == "open", subscriptions.c.status.in_(sorted(PAYABLE))),
            and_(
                invoices.c.status == "uncollectible",
                subscriptions.c.status.in_(sorted(PAYABLE_DEBT)),
            ),
        ),
        exists().where(switches.c.name == SALES, switches.c.is_on),
        ~exists().where(
            _undecided.c.invoice_id == attempts.c.invoice_id,
            _undecided.c.undecided_since.is_not(None),
        ),
    )
)


def payable(attempt_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Return whether the customer may pay on the page of this attempt now."""
    return _PAYABLE.where(attempts.c.id == attempt_id).exists()


def page_of(connection: Connection, attempt_id: int) -> bytes | None:
    """Return the encrypted page while the customer may pay on it.

    None if it is paid, ended, released or stopped, or if another attempt of the invoice may still
    be paid.
    """
    return connection.execute(_PAYABLE.where(attempts.c.id == attempt_id)).scalar()


def page_named(connection: Connection, digest: str) -> bytes | None:
    """Return the same by the digest of the page's name."""
    return connection.execute(_PAYABLE.where(attempts.c.page_digest == digest)).scalar()


def is_paid(connection: Connection, digest: str) -> bool:
    """Return whether the page of this name was paid, or its invoice was paid in another way."""
    paid = or_(attempts.c.status.in_(sorted(PAID)), invoices.c.status == InvoiceStatus.PAID)
    query = select(attempts.c.id).join(invoices, invoices.c.id == attempts.c.invoice_id)
    return (
        connection.execute(query.where(attempts.c.page_digest == digest, paid)).first() is not None
    )


def name_page(connection: Connection, attempt_id: int, page: bytes, digest: str) -> None:
    """Name a page that was opened without a name. The name is part of the encrypted `page`."""
    connection.execute(
        update(attempts).where(attempts.c.id == attempt_id).values(page=page, page_digest=digest)
    )


def others(connection: Connection, attempt: Attempt) -> list[Attempt]:
    """Return the other attempts of its invoice, oldest first."""
    query = (
        select(attempts)
        .where(attempts.c.invoice_id == attempt.invoice_id, attempts.c.id != attempt.id)
        .order_by(attempts.c.number)
    )
    return [attempt_from(row) for row in connection.execute(query)]


def key_of(connection: Connection, attempt_id: int) -> CaseKey:
    query = (
        select(attempts.c.invoice_id, invoices.c.subscription_id)
        .join(invoices, invoices.c.id == attempts.c.invoice_id)
        .where(attempts.c.id == attempt_id)
    )
    row = connection.execute(query).one()
    return CaseKey(row.subscription_id, row.invoice_id, attempt_id)


_KNOWN_BY_REFERENCE = (
    select(attempts.c.id, attempts.c.invoice_id, invoices.c.subscription_id)
    .join(invoices, invoices.c.id == attempts.c.invoice_id)
    .where(
        attempts.c.id.in_(bindparam("ids", expanding=True)),
        # Literals, because the index is partial: with bound values SQLite plans the statement at
        # each call.
        attempts.c.gateway_id.is_(None),
        or_(
            and_(
                attempts.c.origin == literal_column("'link'"),
                attempts.c.status == literal_column("'prepared'"),
                attempts.c.lease_until <= bindparam("now"),
            ),
            and_(
                attempts.c.status == literal_column("'not_charged'"),
                attempts.c.next_poll_at.is_not(None),
            ),
        ),
    )
    .order_by(attempts.c.id)
)


def known_by_reference(
    connection: Connection, attempt_ids: Sequence[int], now: datetime
) -> list[CaseKey]:
    """Return those of the attempts without a gateway id that are found by reference.

    These are prepared links whose caller is gone, and ended ones that are still polled.
    """
    rows = connection.execute(_KNOWN_BY_REFERENCE, {"ids": list(attempt_ids), "now": now})
    return [CaseKey(row.subscription_id, row.invoice_id, row.id) for row in rows]
