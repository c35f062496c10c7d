"""One-off charges: one period, opened at once, through the same protocol.

A one-off charge is stored as a subscription of one period that has already ended. Sweeps and
catch-up never find it, an ended subscription still owes its invoices, and all rules of charging
apply as for a period.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up import Action, Planned
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import reference_for
from billing_worker.domain.subscription import (
    ONE_OFF,
    Subscription,
    SubscriptionStatus,
    open_next_period,
)
from billing_worker.domain.timings import Timings
from billing_worker.persistence import cards, customers, history, invoices, subscriptions
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.book.identity import Other
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.cards.keep import card_row
from billing_worker.services.commands.records import OneOff
from billing_worker.services.customers import known_as
from billing_worker.services.invoicing.decided_at import not_in_the_future
from billing_worker.services.invoicing.renew import MESSAGE_LOST_AFTER
from billing_worker.services.ports import Vault
from billing_worker.services.subscriptions.subscribe import moved_away


def charge_once(
    store: Store, vault: Vault, clock: Clock, timings: Timings, order: OneOff
) -> tuple[int, str]:
    """Open the invoice of a one-off charge; return its id, to ring for, and its reference.

    With no card in the order the customer's default one is charged. One that was decided
    earlier is charged now, and its period begins then: in restored books it is looked for first.
    Raises InvalidInput on `reference_id` when a subscription or another charge has it, on `card`
    when there is none, and on `decided_at`.
    """
    now = clock.now()
    begins = now if order.decided_at is None else not_in_the_future(order.decided_at, now)
    with store.transaction() as connection:
        if subscriptions.find(connection, order.reference_id) is not None:
            raise InvalidInput("reference_id", "is already used by a subscription or a charge.")
        if (fault := moved_away(connection)) is not None:
            raise fault
        customer_id, card_id = _payer(connection, vault, order, now)
        subscription = _subscription(order, customer_id, card_id, begins)
        period, moved = open_next_period(subscription, now)
        began = books.may_have_begun_in(connection, now)
        [row_id] = subscriptions.add(connection, [_row(moved, order, now, began)])
        enqueue_at = now + max(timings.stuck_after, MESSAGE_LOST_AFTER)
        planned = Planned(period, Action.COLLECT, "one_off", None, now)
        due = [(replace(subscription, id=row_id), planned)]
        [(invoice_id, _, _)] = invoices.open_periods(connection, due, now, enqueue_at)
        history.write(connection, _told(order, row_id, invoice_id, now))
    return invoice_id, reference_for(order.reference_id, period.number)


def _payer(connection: Connection, vault: Vault, order: OneOff, now: datetime) -> tuple[int, int]:
    """Return the ids of the customer and of the card to charge."""
    by = f"command:{order.reference_id}"
    customer_id = known_as(connection, [order.customer], by, now)[order.customer.reference_id]
    if order.card is not None:
        [card_id] = customers.add_cards(connection, [card_row(vault, order.card, customer_id, now)])
        return customer_id, card_id
    default = cards.defaults_of(connection, [customer_id], now).get(customer_id)
    if default is None:
        raise InvalidInput("card", "is missing, and the customer has none on file to charge.")
    return customer_id, default.id


def _subscription(order: OneOff, customer_id: int, card_id: int, now: datetime) -> Subscription:
    return Subscription(
        id=0,
        reference_id=order.reference_id,
        customer_id=customer_id,
        card_id=card_id,
        status=SubscriptionStatus.ACTIVE,
        money=order.money,
        schedule=Schedule(now, Unit.DAY, 1, "UTC"),
        ends_after_periods=1,
        next_period=0,
        next_billing_at=now,
        description=order.description,
    )


def _row(
    subscription: Subscription, order: OneOff, now: datetime, began: Other | None
) -> dict[str, Any]:
    schedule = subscription.schedule
    return {
        "reference_id": subscription.reference_id,
        "customer_id": subscription.customer_id,
        "card_id": subscription.card_id,
        "status": subscription.status,
        "amount_minor": subscription.money.minor,
        "currency": subscription.money.currency,
        "interval": schedule.unit,
        "interval_count": schedule.count,
        "anchor_at": schedule.anchor,
        "timezone": schedule.tz,
        "ends_after_periods": subscription.ends_after_periods,
        "next_period": subscription.next_period,
        "next_billing_at": subscription.next_billing_at,
        "description": subscription.description,
        "metadata": order.metadata,
        "record_digest": "",  # no import record
        "created_at": now,
        "kind": ONE_OFF,
        "from_book": began.identity if began else None,
        "from_prefix": began.prefix if began else None,
    }


def _told(order: OneOff, row_id: int, invoice_id: int, now: datetime) -> list[Entry]:
    by = f"command:{order.reference_id}"
    data = {"amount": str(order.money), "customer": order.customer.reference_id}
    rule = {"rule": "one-off charge", "amount": str(order.money)}
    return [
        Entry(Event(EventKind.CHARGE_ORDERED, now, by, data), row_id),
        Entry(Event(EventKind.INVOICE_OPENED, now, by, rule), row_id, invoice_id),
    ]
