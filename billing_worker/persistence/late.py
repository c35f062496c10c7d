"""What a customer pays anyway, and which late periods wait for a person."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, Select, bindparam, select, union, update

from billing_worker.domain.catch_up import HELD, Action, Diary, Planned
from billing_worker.domain.catch_up_policy import MAX_DAYS
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.subscription import COLLECTABLE, Subscription
from billing_worker.persistence.rows import invoice_from, subscription_from
from billing_worker.persistence.tables import attempts, customers, invoices, subscriptions

_MADE = ("submitted", "succeeded", "surplus")


def lock_customers(connection: Connection, customer_ids: Collection[int]) -> None:
    """Take turns with other sweeps that date debits of the same customers.

    Always after the subscriptions and before the invoices, in the order of the ids: no circle.
    """
    if customer_ids:
        connection.execute(
            select(customers.c.id)
            .where(customers.c.id.in_(sorted(customer_ids)))
            .order_by(customers.c.id)
            .with_for_update()
        )


def diaries(
    connection: Connection, customer_ids: Collection[int], now: datetime
) -> dict[int, Diary]:
    """By customer: debits of the last year, those that are dated, and the agreed dates to come."""
    if not customer_ids:
        return {}
    debits = _debits(connection, customer_ids, now - timedelta(days=MAX_DAYS))
    calendars = _calendars(connection, customer_ids)
    return {
        customer: Diary(tuple(sorted(debits[customer])), tuple(calendars[customer]))
        for customer in customer_ids
    }


def _debits(
    connection: Connection, customer_ids: Collection[int], since: datetime
) -> dict[int, set[datetime]]:
    made = (
        select(subscriptions.c.customer_id, attempts.c.submitted_at.label("at"))
        .join(invoices, invoices.c.subscription_id == subscriptions.c.id)
        .join(attempts, attempts.c.invoice_id == invoices.c.id)
        .where(
            subscriptions.c.customer_id.in_(customer_ids),
            attempts.c.status.in_(_MADE),
            attempts.c.submitted_at >= since,
        )
    )
    dated = (
        select(subscriptions.c.customer_id, invoices.c.next_attempt_at.label("at"))
        .join(invoices, invoices.c.subscription_id == subscriptions.c.id)
        .where(
            subscriptions.c.customer_id.in_(customer_ids),
            invoices.c.status == "open",
            invoices.c.next_attempt_at.is_not(None),
        )
    )
    found: dict[int, set[datetime]] = defaultdict(set)
    for query in (made, dated):
        for row in connection.execute(query):
            found[row.customer_id].add(row.at)
    return found


def _calendars(
    connection: Connection, customer_ids: Collection[int]
) -> dict[int, list[Subscription]]:
    query = (
        select(subscriptions)
        .where(
            subscriptions.c.customer_id.in_(customer_ids),
            subscriptions.c.next_billing_at.is_not(None),
        )
        .order_by(subscriptions.c.id)
    )
    found: dict[int, list[Subscription]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.customer_id].append(subscription_from(row))
    return found


# --- for the person who decides --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LateSubscription:
    """A subscription with due periods, or periods on hold, or both."""

    subscription: Subscription
    customer_reference: str
    held: tuple[Invoice, ...]  # oldest first


def customers_with_late(
    connection: Connection, now: datetime, after_id: int, limit: int
) -> list[int]:
    """A page of ids, in order, of customers who have something due or on hold."""
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


def late_of(
    connection: Connection, customer_ids: Collection[int], now: datetime, *, lock: bool
) -> dict[int, list[LateSubscription]]:
    """By customer, in the order in which the sweep takes them. `lock` to write afterwards."""
    held_ids = _held().with_only_columns(subscriptions.c.id)
    query = (
        select(subscriptions, customers.c.reference_id.label("customer_reference"))
        .join(customers, customers.c.id == subscriptions.c.customer_id)
        .where(
            subscriptions.c.customer_id.in_(customer_ids),
            (subscriptions.c.next_billing_at <= now) | subscriptions.c.id.in_(held_ids),
        )
        .order_by(subscriptions.c.id)
    )
    if lock:
        query = query.with_for_update(of=subscriptions)
    rows = connection.execute(query).all()
    held = _held_of(connection, [row.id for row in rows], lock=lock)
    found: dict[int, list[LateSubscription]] = defaultdict(list)
    for row in rows:
        one = LateSubscription(subscription_from(row), row.customer_reference, tuple(held[row.id]))
        found[row.customer_id].append(one)
    for late in found.values():
        late.sort(key=lambda one: (one.subscription.next_billing_at or now, one.subscription.id))
    return found


def _held() -> Select[tuple[Invoice]]:
    return (
        select(invoices)
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .where(
            invoices.c.status == "open",
            invoices.c.next_attempt_at.is_(None),
            invoices.c.reason.startswith(HELD, autoescape=True),
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
        ring_at=bindparam("at"),
    )
)


def decide_held(connection: Connection, decided: Sequence[tuple[Invoice, Planned]]) -> None:
    """Write what becomes of locked invoices that were on hold."""
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
