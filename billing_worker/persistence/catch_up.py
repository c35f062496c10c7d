"""Queries for catch-up: the other debits of a subscription, and the late periods that wait for a
person.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, func, or_, select, union, update

from billing_worker.domain.catch_up import CATCH_UP_RULE, LATE_AFTER, Action, Diary, Planned
from billing_worker.domain.catch_up_policy import MAX_DAYS
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.subscription import COLLECTABLE, Subscription
from billing_worker.persistence.claims import HAS_LIVE_ATTEMPT
from billing_worker.persistence.rows import TERMS, Unreadable, invoice_from, readable
from billing_worker.persistence.schema.tables import attempts, customers, invoices, subscriptions

_MADE = ("submitted", "succeeded", "surplus")


def diaries(
    connection: Connection, subscription_ids: Collection[int], now: datetime
) -> dict[int, Diary]:
    """Return by subscription: its debits of the last year, and those with a date."""
    if not subscription_ids:
        return {}
    debits = _debits(connection, subscription_ids, now)
    return {one: Diary(tuple(sorted(debits[one]))) for one in subscription_ids}


def _debits(
    connection: Connection, subscription_ids: Collection[int], now: datetime
) -> dict[int, set[datetime]]:
    made: Any = (
        select(invoices.c.subscription_id, attempts.c.submitted_at.label("at"))
        .join(attempts, attempts.c.invoice_id == invoices.c.id)
        .where(
            invoices.c.subscription_id.in_(subscription_ids),
            attempts.c.status.in_(_MADE),
            attempts.c.submitted_at >= now - timedelta(days=MAX_DAYS),
        )
    )
    dated: Any = select(invoices.c.subscription_id, invoices.c.next_attempt_at.label("at")).where(
        invoices.c.subscription_id.in_(subscription_ids),
        invoices.c.status == "open",
        # A missed charge has lost its date: it gets another one (`catch_up.was_missed`).
        or_(
            invoices.c.next_attempt_at >= now - LATE_AFTER,
            (invoices.c.next_attempt_at < now) & (invoices.c.next_origin != "scheduled"),
        ),
    )
    found: dict[int, set[datetime]] = defaultdict(set)
    for query in (made, dated):
        for row in connection.execute(query):
            found[row.subscription_id].add(row.at)
    return found


def newest_periods(connection: Connection, subscription_ids: Collection[int]) -> dict[int, int]:
    """Return by subscription the number of the latest opened period that is not void."""
    query = (
        select(invoices.c.subscription_id, func.max(invoices.c.period_number).label("number"))
        .where(invoices.c.subscription_id.in_(subscription_ids), invoices.c.status != "void")
        .group_by(invoices.c.subscription_id)
    )
    return {row.subscription_id: row.number for row in connection.execute(query)}


# --- for the person who decides --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LateSubscription:
    """A subscription with due periods, held periods, or both."""

    subscription: Subscription
    held: tuple[Invoice, ...]  # oldest first


def customers_with_late(
    connection: Connection, now: datetime, after_id: int, limit: int
) -> list[int]:
    """Return ids of customers with due or held periods, in order, one batch at a time."""
    due = select(subscriptions.c.customer_id).where(
        subscriptions.c.next_billing_at <= now, subscriptions.c.customer_id > after_id
    )
    held = (
        _held()
        .with_only_columns(subscriptions.c.customer_id)
        .where(subscriptions.c.customer_id > after_id)
    )
    both = union(due, held).subquery()
    query = select(both.c.customer_id).order_by(both.c.customer_id).limit(limit)
    return list(connection.execute(query).scalars())


@dataclass(frozen=True, slots=True)
class LateOf:
    """The late subscriptions of one customer."""

    customer_reference: str
    readable: list[LateSubscription] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)


def late_of(
    connection: Connection, customer_ids: Collection[int], now: datetime, *, lock: bool
) -> dict[int, LateOf]:
    """Return late subscriptions by customer, in the order of the sweep. `lock`: the caller writes
    afterwards.
    """
    held_ids = _held().with_only_columns(subscriptions.c.id)
    query: Select[Any] = (
        select(*TERMS, customers.c.reference_id.label("customer_reference"))
        .join(customers, customers.c.id == subscriptions.c.customer_id)
        .where(
            subscriptions.c.customer_id.in_(customer_ids),
            (subscriptions.c.next_billing_at <= now) | subscriptions.c.id.in_(held_ids),
        )
        .order_by(subscriptions.c.id)
    )
    if lock:
        query = query.with_for_update(of=subscriptions)
    rows: Sequence[Row[Any]] = connection.execute(query).all()
    held = _held_of(connection, [row.id for row in rows], lock=lock)
    found = {row.customer_id: LateOf(row.customer_reference) for row in rows}
    read, unreadable = readable(rows)
    for subscription in read:
        one = LateSubscription(subscription, tuple(held[subscription.id]))
        found[subscription.customer_id].readable.append(one)
    for broken in unreadable:
        found[broken.customer_id].unreadable.append(broken)
    for late in found.values():
        late.readable.sort(
            key=lambda one: (one.subscription.next_billing_at or now, one.subscription.id)
        )
    return found


def _held() -> Select[tuple[Invoice]]:
    return (
        select(invoices)
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .where(
            invoices.c.status == "open",
            invoices.c.next_attempt_at.is_(None),
            invoices.c.reason.startswith(CATCH_UP_RULE, autoescape=True),
            ~HAS_LIVE_ATTEMPT,  # A pay page exists for it: the payment on that page decides.
            subscriptions.c.status.in_(COLLECTABLE),
        )
    )


def _held_of(
    connection: Connection, subscription_ids: Collection[int], *, lock: bool
) -> dict[int, list[Invoice]]:
    query = (
        _held()
        .where(invoices.c.subscription_id.in_(subscription_ids))
        .order_by(invoices.c.subscription_id, invoices.c.period_number)
    )
    if lock:
        query = query.with_for_update(of=invoices)
    found: dict[int, list[Invoice]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.subscription_id].append(invoice_from(row))
    return found


_DECIDE = (
    update(invoices)
    .where(invoices.c.id == bindparam("row_id"), invoices.c.status == "open")
    .values(
        status=bindparam("new_status"),
        reason=bindparam("new_reason"),
        next_attempt_at=bindparam("at"),
        enqueue_at=bindparam("at"),
    )
)


def decide_held(connection: Connection, decided: Sequence[tuple[Invoice, Planned]]) -> None:
    """Write the decisions about locked invoices that were held."""
    if decided:
        connection.execute(
            _DECIDE,
            [
                {
                    "row_id": invoice.id,
                    "new_status": "void" if planned.action is Action.WAIVE else "open",
                    "new_reason": planned.reason,
                    "at": planned.at,
                }
                for invoice, planned in decided
            ],
        )
