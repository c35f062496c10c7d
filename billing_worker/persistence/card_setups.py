"""Card set-ups: payments on the gateway's page that store a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    Select,
    bindparam,
    case,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from billing_worker.domain.card_setup import PAID_SETUPS, HostedPayment, HostedStatus
from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.invoice import RECOVERY_ENDED, InvoiceStatus
from billing_worker.persistence import pay_links
from billing_worker.persistence.book import identity
from billing_worker.persistence.rows import MONEY
from billing_worker.persistence.schema.mapping import Objects, Part, Update
from billing_worker.persistence.schema.tables import (
    attempts,
    cards,
    customers,
    hosted_payments,
    invoices,
    subscriptions,
)

_OBJECTS = Objects(
    HostedPayment,
    status=Part(("status",), HostedStatus),
    money=MONEY,
)
payment_from = _OBJECTS.read


def _payments() -> Select[Any]:
    customer = customers.c.reference_id.label("customer_reference")
    return select(hosted_payments, customer, identity.IDENTITY).join(
        customers, customers.c.id == hosted_payments.c.customer_id
    )


def find(connection: Connection, reference_id: str) -> tuple[HostedPayment, str] | None:
    """Return a card set-up by the caller's reference, with the digest of the record that ordered
    it.
    """
    row = connection.execute(
        _payments().where(hosted_payments.c.reference_id == reference_id)
    ).one_or_none()
    return (payment_from(row), row.record_digest) if row else None


def of_attempt(connection: Connection, attempt_id: int) -> HostedPayment | None:
    """Return the payment whose page holds the slot of an invoice by this attempt."""
    query = _payments().where(hosted_payments.c.attempt_id == attempt_id)
    row = connection.execute(query).one_or_none()
    return payment_from(row) if row else None


def lock(connection: Connection, payment_id: int) -> HostedPayment:
    """Lock a card set-up: always the last lock, after subscriptions, invoices and attempts."""
    query = _payments().where(hosted_payments.c.id == payment_id)
    return payment_from(connection.execute(query.with_for_update(of=hosted_payments)).one())


def add(connection: Connection, values: Mapping[str, Any]) -> int:
    """Write a prepared card set-up. Raises IntegrityError if its reference exists."""
    row = {"status": HostedStatus.PREPARED, "fence": 1, **values}
    added = connection.execute(insert(hosted_payments).returning(hosted_payments.c.id), row)
    return int(added.scalar_one())


def take_over(connection: Connection, payment: HostedPayment, lapses_at: datetime) -> int:
    """Take over a prepared card set-up for a newer caller. Return the new fence."""
    fence = payment.fence + 1
    _change(connection, payment, {"fence": fence, "next_poll_at": lapses_at})
    return fence


def open_page(
    connection: Connection,
    payment: HostedPayment,
    *,
    gateway_id: str,
    page: bytes,
    page_digest: str,
    now: datetime,
    next_poll_at: datetime,
) -> None:
    """Move it from prepared to open under the fence. Raises ConcurrentChange if another caller has
    taken over.
    """
    _change(
        connection,
        payment,
        {
            "status": HostedStatus.OPEN,
            "gateway_id": gateway_id,
            "page": page,
            "page_digest": page_digest,
            "opened_at": now,
            "next_poll_at": next_poll_at,
        },
    )


_SAVE = Update(
    _OBJECTS,
    hosted_payments,
    [
        "status", "gateway_id", "opened_at", "settled_at", "next_poll_at", "unpaid_since", "outcome",
    ],
    under=["status", "fence"],
    card_id=func.coalesce(
        bindparam("new_card_id", type_=hosted_payments.c.card_id.type), hosted_payments.c.card_id
    ),
    page=case(
        (
            bindparam("new_status", type_=hosted_payments.c.status.type) == HostedStatus.OPEN,
            hosted_payments.c.page,
        )
    ),
)  # fmt: skip


def save(
    connection: Connection, before: HostedPayment, after: HostedPayment, card_id: int | None
) -> None:
    """Write a change, and the card that came of it. Raises ConcurrentChange if another caller has
    taken over.
    """
    _SAVE.write(connection, [(before, after)], new_card_id=card_id)


def _change(connection: Connection, before: HostedPayment, values: Mapping[str, Any]) -> None:
    changed = connection.execute(
        update(hosted_payments)
        .where(
            hosted_payments.c.id == before.id,
            hosted_payments.c.fence == before.fence,
            hosted_payments.c.status == before.status,
        )
        .values(dict(values))
    )
    if changed.rowcount != 1:
        raise ConcurrentChange(f"{before.reference_id} was taken over by another caller")


_PAYABLE = select(hosted_payments.c.page).where(
    hosted_payments.c.status == HostedStatus.OPEN,
    hosted_payments.c.unpaid_since.is_(None),
    or_(
        hosted_payments.c.attempt_id.is_(None),
        pay_links.payable(hosted_payments.c.attempt_id),
    ),
)


def page_of(connection: Connection, payment_id: int) -> bytes | None:
    """Return the encrypted page as long as the customer may pay on it, and may pay its invoice if
    it has one.
    """
    return connection.execute(_PAYABLE.where(hosted_payments.c.id == payment_id)).scalar()


def page_named(connection: Connection, digest: str) -> bytes | None:
    """Return the same by the digest of the page's name."""
    return connection.execute(_PAYABLE.where(hosted_payments.c.page_digest == digest)).scalar()


def is_paid(connection: Connection, digest: str) -> bool:
    """Return whether the page of this name was paid, or its invoice was paid in another way."""
    query = (
        select(hosted_payments.c.id)
        .outerjoin(attempts, attempts.c.id == hosted_payments.c.attempt_id)
        .outerjoin(invoices, invoices.c.id == attempts.c.invoice_id)
        .where(
            hosted_payments.c.page_digest == digest,
            or_(
                hosted_payments.c.status.in_(sorted(PAID_SETUPS)),
                invoices.c.status == InvoiceStatus.PAID,
            ),
        )
    )
    return connection.execute(query).first() is not None


def name_page(connection: Connection, payment_id: int, page: bytes, digest: str) -> None:
    """Name a page that was opened without a name. The name is part of the encrypted `page`."""
    connection.execute(
        update(hosted_payments)
        .where(hosted_payments.c.id == payment_id)
        .values(page=page, page_digest=digest)
    )


_DUE = (
    _payments()
    .where(hosted_payments.c.next_poll_at <= bindparam("now"))
    .order_by(hosted_payments.c.next_poll_at)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=hosted_payments)
)


def take_due(
    connection: Connection, now: datetime, again_at: datetime, limit: int
) -> list[HostedPayment]:
    """Return up to `limit` card set-ups that are due for polling, and set their next poll."""
    due = [payment_from(row) for row in connection.execute(_DUE, {"now": now, "most": limit})]
    if due:
        connection.execute(
            update(hosted_payments)
            .where(hosted_payments.c.id.in_([payment.id for payment in due]))
            .values(next_poll_at=again_at)
        )
    return due


def customer_reference(connection: Connection, customer_id: int) -> str:
    query = select(customers.c.reference_id).where(customers.c.id == customer_id)
    return str(connection.execute(query).scalar_one())


# --- what operators ask -----------------------------------------------------------------------


def find_by_any(connection: Connection, reference: str) -> HostedPayment | None:
    """Find a card set-up by the caller's reference, the gateway's reference or the gateway's id."""
    table = hosted_payments.c
    by = (table.reference_id, table.gateway_reference, table.gateway_id)
    rows = connection.execute(_payments().where(or_(*(column == reference for column in by))))
    found = [payment_from(row) for row in rows]
    return min(found, key=lambda one: one.reference_id != reference, default=None)


def summary(connection: Connection) -> Sequence[Row[Any]]:
    """Return count and sum of set-ups without an invoice, by status and currency."""
    keys = (hosted_payments.c.status, hosted_payments.c.currency)
    query = (
        select(
            *keys,
            func.count().label("payments"),
            func.sum(hosted_payments.c.amount_minor).label("minor"),
        )
        .where(hosted_payments.c.attempt_id.is_(None))
        .group_by(*keys)
        .order_by(*keys)
    )
    return connection.execute(query).all()


# --- the card that comes of it ----------------------------------------------------------------


def lock_subscriptions_of(connection: Connection, customer_id: int) -> None:
    """Lock the customer's subscriptions. Needed before a set-up is locked that may change their
    card.
    """
    connection.execute(
        select(subscriptions.c.id)
        .where(subscriptions.c.customer_id == customer_id)
        .order_by(subscriptions.c.id)
        .with_for_update()
    )


def owners_of(connection: Connection, fingerprint: str) -> dict[int, int]:
    """Return customers who have a card with this token: {customer id: card id}."""
    query = select(cards.c.customer_id, cards.c.id).where(cards.c.fingerprint == fingerprint)
    return {row.customer_id: row.id for row in connection.execute(query.order_by(cards.c.id))}


_OPEN = exists().where(
    invoices.c.subscription_id == subscriptions.c.id, invoices.c.status == "open"
)
_WAITS = exists().where(
    invoices.c.subscription_id == subscriptions.c.id,
    invoices.c.status == "open",
    or_(invoices.c.give_up_at.is_not(None), invoices.c.reason.startswith(RECOVERY_ENDED)),
)


def billed_to(connection: Connection, customer_id: int) -> Sequence[Row[Any]]:
    """(id, card_id) of all that the customer may still be charged for."""
    query: Select[Any] = select(subscriptions.c.id, subscriptions.c.card_id).where(
        subscriptions.c.customer_id == customer_id,
        or_(subscriptions.c.status.not_in(["cancelled", "ended"]), _OPEN),
        subscriptions.c.status != "cancelled",
    )
    return connection.execute(query).all()


def that_wait(connection: Connection, customer_id: int) -> Sequence[Row[Any]]:
    """(id,) of subscriptions with an invoice that waits for the customer, or did so in vain."""
    query = select(subscriptions.c.id).where(
        subscriptions.c.customer_id == customer_id,
        subscriptions.c.status.not_in(["cancelled", "suspended"]),
        _WAITS,
    )
    return connection.execute(query).all()


def subscription_of(connection: Connection, payment: HostedPayment) -> Row[Any] | None:
    """(id, card_id) of the subscription whose invoice is paid on this page."""
    query: Select[Any] = (
        select(subscriptions.c.id, subscriptions.c.card_id)
        .join(invoices, invoices.c.subscription_id == subscriptions.c.id)
        .join(attempts, attempts.c.invoice_id == invoices.c.id)
        .where(attempts.c.id == payment.attempt_id, subscriptions.c.status != "cancelled")
    )
    return connection.execute(query).one_or_none()
