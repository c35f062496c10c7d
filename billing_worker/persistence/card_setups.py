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

from billing_worker.domain.card_setup import PAID_SETUPS, CardSetup, CardSetupStatus
from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.invoice import RECOVERY_ENDED, InvoiceStatus
from billing_worker.persistence import pay_links
from billing_worker.persistence.book import identity
from billing_worker.persistence.rows import MONEY
from billing_worker.persistence.schema.mapping import Objects, Part, Update
from billing_worker.persistence.schema.tables import (
    attempts,
    card_setups,
    cards,
    customers,
    invoices,
    subscriptions,
)

_OBJECTS = Objects(
    CardSetup,
    status=Part(("status",), CardSetupStatus),
    money=MONEY,
)
setup_from = _OBJECTS.read


def _setups() -> Select[Any]:
    customer = customers.c.reference_id.label("customer_reference")
    return select(card_setups, customer, identity.IDENTITY).join(
        customers, customers.c.id == card_setups.c.customer_id
    )


def find(connection: Connection, reference_id: str) -> tuple[CardSetup, str] | None:
    """Return a card set-up by the caller's reference, with the digest of the record that ordered
    it.
    """
    row = connection.execute(
        _setups().where(card_setups.c.reference_id == reference_id)
    ).one_or_none()
    return (setup_from(row), row.record_digest) if row else None


def of_attempt(connection: Connection, attempt_id: int) -> CardSetup | None:
    """Return the card set-up whose page holds the slot of an invoice by this attempt."""
    query = _setups().where(card_setups.c.attempt_id == attempt_id)
    row = connection.execute(query).one_or_none()
    return setup_from(row) if row else None


def lock(connection: Connection, setup_id: int) -> CardSetup:
    """Lock a card set-up: always the last lock, after subscriptions, invoices and attempts.

    Raises ConcurrentChange if the books have forgotten it.
    """
    query = _setups().where(card_setups.c.id == setup_id)
    row = connection.execute(query.with_for_update(of=card_setups)).one_or_none()
    if row is None:
        raise ConcurrentChange(f"card set-up {setup_id} is not in the books any more")
    return setup_from(row)


def add(connection: Connection, values: Mapping[str, Any]) -> int:
    """Write a prepared card set-up. Raises IntegrityError if its reference exists."""
    row = {"status": CardSetupStatus.PREPARED, "fence": 1, **values}
    added = connection.execute(insert(card_setups).returning(card_setups.c.id), row)
    return int(added.scalar_one())


def take_over(connection: Connection, setup: CardSetup, lapses_at: datetime) -> int:
    """Take over a prepared card set-up for a newer caller. Return the new fence."""
    fence = setup.fence + 1
    _change(connection, setup, {"fence": fence, "next_poll_at": lapses_at})
    return fence


def open_page(
    connection: Connection,
    setup: CardSetup,
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
        setup,
        {
            "status": CardSetupStatus.OPEN,
            "gateway_id": gateway_id,
            "page": page,
            "page_digest": page_digest,
            "opened_at": now,
            "next_poll_at": next_poll_at,
        },
    )


_SAVE = Update(
    _OBJECTS,
    card_setups,
    [
        "status", "gateway_id", "opened_at", "settled_at", "next_poll_at", "unpaid_since", "outcome",
    ],
    under=["status", "fence"],
    card_id=func.coalesce(
        bindparam("new_card_id", type_=card_setups.c.card_id.type), card_setups.c.card_id
    ),
    page=case(
        (
            bindparam("new_status", type_=card_setups.c.status.type) == CardSetupStatus.OPEN,
            card_setups.c.page,
        )
    ),
)  # fmt: skip


def save(connection: Connection, before: CardSetup, after: CardSetup, card_id: int | None) -> None:
    """Write a change, and the card that came of it. Raises ConcurrentChange if another caller has
    taken over.
    """
    _SAVE.write(connection, [(before, after)], new_card_id=card_id)


def _change(connection: Connection, before: CardSetup, values: Mapping[str, Any]) -> None:
    changed = connection.execute(
        update(card_setups)
        .where(
            card_setups.c.id == before.id,
            card_setups.c.fence == before.fence,
            card_setups.c.status == before.status,
        )
        .values(dict(values))
    )
    if changed.rowcount != 1:
        raise ConcurrentChange(f"{before.reference_id} was taken over by another caller")


_PAYABLE = select(card_setups.c.page).where(
    card_setups.c.status == CardSetupStatus.OPEN,
    card_setups.c.unpaid_since.is_(None),
    or_(
        card_setups.c.attempt_id.is_(None),
        pay_links.payable(card_setups.c.attempt_id),
    ),
)


def page_of(connection: Connection, setup_id: int) -> bytes | None:
    """Return the encrypted page as long as the customer may pay on it, and may pay its invoice if
    it has one.
    """
    return connection.execute(_PAYABLE.where(card_setups.c.id == setup_id)).scalar()


def page_named(connection: Connection, digest: str) -> bytes | None:
    """Return the same by the digest of the page's name."""
    return connection.execute(_PAYABLE.where(card_setups.c.page_digest == digest)).scalar()


def is_paid(connection: Connection, digest: str) -> bool:
    """Return whether the page of this name was paid, or its invoice was paid in another way."""
    query = (
        select(card_setups.c.id)
        .outerjoin(attempts, attempts.c.id == card_setups.c.attempt_id)
        .outerjoin(invoices, invoices.c.id == attempts.c.invoice_id)
        .where(
            card_setups.c.page_digest == digest,
            or_(
                card_setups.c.status.in_(sorted(PAID_SETUPS)),
                invoices.c.status == InvoiceStatus.PAID,
            ),
        )
    )
    return connection.execute(query).first() is not None


def name_page(connection: Connection, setup_id: int, page: bytes, digest: str) -> None:
    """Name a page that was opened without a name. The name is part of the encrypted `page`."""
    connection.execute(
        update(card_setups)
        .where(card_setups.c.id == setup_id)
        .values(page=page, page_digest=digest)
    )


_DUE = (
    _setups()
    .where(card_setups.c.next_poll_at <= bindparam("now"))
    .order_by(card_setups.c.next_poll_at)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=card_setups)
)


def take_due(
    connection: Connection, now: datetime, again_at: datetime, limit: int
) -> list[CardSetup]:
    """Return up to `limit` card set-ups that are due for polling, and set their next poll."""
    due = [setup_from(row) for row in connection.execute(_DUE, {"now": now, "most": limit})]
    if due:
        connection.execute(
            update(card_setups)
            .where(card_setups.c.id.in_([setup.id for setup in due]))
            .values(next_poll_at=again_at)
        )
    return due


def customer_reference(connection: Connection, customer_id: int) -> str:
    query = select(customers.c.reference_id).where(customers.c.id == customer_id)
    return str(connection.execute(query).scalar_one())


# --- what operators ask -----------------------------------------------------------------------


def find_by_any(connection: Connection, reference: str) -> CardSetup | None:
    """Find a card set-up by the caller's reference, the gateway's reference or the gateway's id."""
    table = card_setups.c
    by = (table.reference_id, table.gateway_reference, table.gateway_id)
    rows = connection.execute(_setups().where(or_(*(column == reference for column in by))))
    found = [setup_from(row) for row in rows]
    return min(found, key=lambda one: one.reference_id != reference, default=None)


def summary(connection: Connection) -> Sequence[Row[Any]]:
    """Return count and sum of set-ups without an invoice, by status and currency."""
    keys = (card_setups.c.status, card_setups.c.currency)
    query = (
        select(
            *keys,
            func.count().label("payments"),
            func.sum(card_setups.c.amount_minor).label("minor"),
        )
        .where(card_setups.c.attempt_id.is_(None))
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


def subscription_of(connection: Connection, setup: CardSetup) -> Row[Any] | None:
    """(id, card_id) of the subscription whose invoice is paid on this page."""
    query: Select[Any] = (
        select(subscriptions.c.id, subscriptions.c.card_id)
        .join(invoices, invoices.c.subscription_id == subscriptions.c.id)
        .join(attempts, attempts.c.invoice_id == invoices.c.id)
        .where(attempts.c.id == setup.attempt_id, subscriptions.c.status != "cancelled")
    )
    return connection.execute(query).one_or_none()
