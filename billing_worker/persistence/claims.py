"""Taking invoices to charge: each for one worker at a time, under a lease and a fence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from billing_worker.domain import attempt as attempt_rules
from billing_worker.domain.attempt import LIVE, Attempt, AttemptStatus, Origin
from billing_worker.domain.errors import InvariantBroken
from billing_worker.domain.invoice import Invoice
from billing_worker.persistence.cases import CaseKey
from billing_worker.persistence.rows import attempt_from, invoice_from
from billing_worker.persistence.tables import attempts, cards, customers, invoices, subscriptions


@dataclass(frozen=True, slots=True)
class DueInvoice:
    """An open invoice whose time has come, locked, with all its attempts so far."""

    invoice: Invoice
    attempts: tuple[Attempt, ...]
    card_id: int | None

    @property
    def live(self) -> Attempt | None:
        return next((a for a in self.attempts if a.status in LIVE), None)


def lock_due(connection: Connection, invoice_ids: Sequence[int], now: datetime) -> list[DueInvoice]:
    """Lock those of the invoices that are open and due, passing over what others hold."""
    query = (
        select(invoices, subscriptions.c.card_id)
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .where(
            invoices.c.id.in_(invoice_ids),
            invoices.c.status == "open",
            invoices.c.next_attempt_at <= now,
        )
        .order_by(invoices.c.id)
        .with_for_update(skip_locked=True, of=invoices)
    )
    rows = connection.execute(query).all()
    by_invoice: dict[int, list[Attempt]] = defaultdict(list)
    tries = (
        select(attempts)
        .where(attempts.c.invoice_id.in_([row.id for row in rows]))
        .order_by(attempts.c.number)
    )
    for row in connection.execute(tries):
        by_invoice[row.invoice_id].append(attempt_from(row))
    return [DueInvoice(invoice_from(row), tuple(by_invoice[row.id]), row.card_id) for row in rows]


def prepare(
    connection: Connection,
    due: Sequence[tuple[DueInvoice, Origin]],
    *,
    test_mode: bool,
    now: datetime,
    lease_until: datetime,
) -> list[Attempt]:
    """Write the next attempt of each invoice, claimed under fence 1. Card ids must be present."""
    if not due:
        return []
    rows = [
        {
            "reference_id": attempt_rules.reference_for(
                item.invoice.reference_id, len(item.attempts) + 1
            ),
            "invoice_id": item.invoice.id,
            "number": len(item.attempts) + 1,
            "status": AttemptStatus.PREPARED,
            "origin": origin,
            "card_id": item.card_id,
            "amount_minor": item.invoice.money.minor,
            "currency": item.invoice.money.currency,
            "test_mode": test_mode,
            "fence": 1,
            "claims": 1,
            "rechecks": 0,
            "created_at": now,
            "lease_until": lease_until,
        }
        for item, origin in due
    ]
    result = connection.execute(
        insert(attempts).returning(attempts, sort_by_parameter_order=True), rows
    )
    return [attempt_from(row) for row in result]


_TAKE_OVER = (
    update(attempts)
    .where(
        attempts.c.id == bindparam("row_id"),
        attempts.c.fence == bindparam("old_fence"),
        attempts.c.status == "prepared",
    )
    .values(
        fence=attempts.c.fence + 1,
        claims=attempts.c.claims + 1,
        lease_until=bindparam("new_lease_until"),
    )
)


def take_over(connection: Connection, lapsed: Sequence[tuple[Attempt, datetime]]) -> list[Attempt]:
    """Claim prepared attempts whose lease ran out: (attempt, new lease). The fence grows."""
    if not lapsed:
        return []
    result = connection.execute(
        _TAKE_OVER,
        [
            {"row_id": attempt.id, "old_fence": attempt.fence, "new_lease_until": lease}
            for attempt, lease in lapsed
        ],
    )
    if result.rowcount != len(lapsed):
        raise InvariantBroken("an attempt was claimed although its invoice is locked")
    return [
        replace(a, fence=a.fence + 1, claims=a.claims + 1, lease_until=lease) for a, lease in lapsed
    ]


def ring_later(connection: Connection, invoice_ids: Sequence[int], when: datetime) -> None:
    """Push the bell of invoices on."""
    if invoice_ids:
        connection.execute(
            update(invoices).where(invoices.c.id.in_(invoice_ids)).values(ring_at=when)
        )


def hold(connection: Connection, held: Sequence[tuple[int, str]]) -> None:
    """Stop ringing for invoices until something changes: (invoice id, reason)."""
    if held:
        connection.execute(
            update(invoices)
            .where(invoices.c.id == bindparam("row_id"))
            .values(ring_at=None, next_attempt_at=None, reason=bindparam("new_reason")),
            [{"row_id": row_id, "new_reason": reason} for row_id, reason in held],
        )


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays an attempt, and with what."""

    key: CaseKey
    customer_reference: str
    customer_name: str | None
    customer_email: str | None
    description: str | None
    card_token: bytes  # encrypted


def payers(connection: Connection, attempt_ids: Sequence[int]) -> dict[int, Payer]:
    """By attempt id."""
    query = (
        select(
            attempts.c.id.label("attempt_id"),
            attempts.c.invoice_id,
            invoices.c.subscription_id,
            subscriptions.c.description,
            customers.c.reference_id.label("customer_reference"),
            customers.c.name,
            customers.c.email,
            cards.c.token,
        )
        .join(invoices, invoices.c.id == attempts.c.invoice_id)
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .join(customers, customers.c.id == subscriptions.c.customer_id)
        .join(cards, cards.c.id == attempts.c.card_id)
        .where(attempts.c.id.in_(attempt_ids))
    )
    return {row.attempt_id: _payer_from(row) for row in connection.execute(query)}


def _payer_from(row: Any) -> Payer:
    return Payer(
        CaseKey(row.subscription_id, row.invoice_id, row.attempt_id),
        row.customer_reference,
        row.name,
        row.email,
        row.description,
        row.token,
    )
