"""Invoices whose next attempt may have been made in a time that these books have lost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, and_, exists, insert, or_, select

from billing_worker.domain.attempt import LIVE, SUSPECTED, Attempt, AttemptStatus, Origin
from billing_worker.persistence.book import identity as book
from billing_worker.persistence.claims import DueInvoice, next_attempt
from billing_worker.persistence.rows import attempt_from
from billing_worker.persistence.schema.tables import attempts, invoices


def left_without_a_look(
    connection: Connection, lost_at: datetime, searched_until: datetime, since: datetime
) -> list[int]:
    """Return the invoices since `since` that no charge is planned for (closed, paused, held), and
    whose next reference was not looked for at the gateway after the loss of `lost_at`.

    `searched_until`: when the last search was made, or the first loss after it. What was paid before
    is left out: its payment is in the books. So is what this book itself has sold since the loss: it
    has looked for later references before it created one.
    """
    live = and_(attempts.c.invoice_id == invoices.c.id, attempts.c.status.in_(LIVE))
    waits = and_(invoices.c.enqueue_at.is_(None), ~exists().where(live))
    after_it = and_(
        attempts.c.invoice_id == invoices.c.id,
        attempts.c.created_at >= lost_at,
        or_(attempts.c.gateway_id.is_(None), attempts.c.sale_status.is_not(None)),
    )
    query = (
        select(invoices.c.id)
        .where(
            or_(invoices.c.status != "open", waits),
            invoices.c.created_at >= since,
            or_(invoices.c.paid_at.is_(None), invoices.c.paid_at >= searched_until),
            ~exists().where(after_it),
        )
        .order_by(invoices.c.id)
    )
    return list(connection.execute(query).scalars())


def subscriptions_of(connection: Connection, invoice_ids: Sequence[int]) -> set[int]:
    query = select(invoices.c.subscription_id).where(invoices.c.id.in_(invoice_ids))
    return set(connection.execute(query).scalars())


def suspect(
    connection: Connection, items: Sequence[DueInvoice], *, test_mode: bool, now: datetime
) -> list[Attempt]:
    """Write the next attempt of each locked invoice as ended, to be looked for at the gateway: a time
    that these books have lost may have made it.
    """
    if not items:
        return []
    prefix = book.read(connection).prefix
    ended = {
        "status": AttemptStatus.NOT_CHARGED, "claims": 0, "outcome": SUSPECTED,
        "settled_at": now, "next_poll_at": now,
    }  # fmt: skip
    rows = [
        next_attempt(item, prefix, test_mode=test_mode, now=now)
        | ended
        | {"origin": Origin.LINK if item.card_id is None else Origin.SCHEDULED}
        for item in items
    ]
    result = connection.execute(
        insert(attempts).returning(attempts, sort_by_parameter_order=True), rows
    )
    return [attempt_from(row) for row in result]
