"""Open invoices of a subscription that is paused, suspended, resumed or over.

An attempt in flight is never touched: only the gateway's answer ends it. A prepared attempt ends
here, because these books cannot have sent it: every caller holds the subscription's lock, which a
submit takes too. The gateway is polled later for a sale in a time that the books have lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from billing_worker.domain import invoice as invoices
from billing_worker.domain import lifecycle
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.dunning import ASKED_FOR
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.outcome import withdrawn
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.persistence import attempts, claims, history, subscriptions
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry


@dataclass(frozen=True, slots=True)
class Moment:
    """When something is done, and by whom."""

    now: datetime
    by: str

    def event(self, kind: EventKind, **data: Any) -> Event:
        return Event(kind, self.now, self.by, data)


def put_aside(
    connection: Connection, subscription_id: int, moment: Moment, reason: str = invoices.PAUSED
) -> int:
    """Stop collecting open invoices until `take_up_again`. Returns how many invoices wait.

    A suspended subscription is still charged on request: a payment reactivates it.
    """
    items = claims.lock_open(connection, subscription_id)
    if reason == invoices.SUSPENDED:
        items = [item for item in items if item.invoice.next_origin not in ASKED_FOR]
    end_prepared(connection, items, reason, moment)
    return _change(connection, items, lambda i: invoices.put_aside(i, reason), _waits, moment)


def take_up_again(
    connection: Connection,
    subscription_id: int,
    moment: Moment,
    waited: timedelta = timedelta(0),
) -> int:
    """Collect again what was put aside. Returns how many invoices.

    Waits for the customer are extended by `waited`.
    """
    items = claims.lock_open(connection, subscription_id)
    return _change(
        connection, items, lambda i: invoices.take_up_again(i, moment.now, waited), _waits, moment
    )


def resume(
    connection: Connection, before: Subscription, at: datetime, moment: Moment, *, shift: bool
) -> tuple[Subscription, dict[str, Any]]:
    """End the pause of a locked subscription as of `at`, and collect again what is open.

    Returns how it stands, which the caller writes, and what to say of it.
    """
    owes = bool(claims.lock_open(connection, before.id))
    waited = at - before.paused_at if before.paused_at else timedelta(0)
    done = lifecycle.resumed(before, at, shift=shift, owes=owes)
    take_up_again(connection, before.id, moment, waited)
    return done.subscription, {
        "shift_anchor": shift,
        "skipped_periods": [done.skipped[0], done.skipped[-1]] if done.skipped else None,
        "paused_at": before.paused_at.isoformat() if before.paused_at else None,
        "anchor_at": done.subscription.schedule.anchor.isoformat(),
    }


def end_at_its_date(connection: Connection, before: Subscription, moment: Moment) -> Subscription:
    """End a pause whose date has come, as of that date: whoever comes late prolongs none. Returns the
    subscription as it is written.
    """
    at = before.resumes_at or moment.now
    after, told = resume(connection, before, at, moment, shift=before.resumes_shifted)
    subscriptions.save(connection, before, after)
    said = moment.event(EventKind.SUBSCRIPTION_RESUMED, resumed_at=at.isoformat(), **told)
    history.write(connection, [Entry(said, before.id)])
    return after


def wait_longer(connection: Connection, subscription_id: int, by: timedelta) -> None:
    """Extend the waits for the customer by this time."""
    waiting = [i.invoice for i in claims.lock_open(connection, subscription_id)]
    pairs = [(i, replace(i, give_up_at=i.give_up_at + by)) for i in waiting if i.give_up_at]
    attempts.save_open(connection, [], pairs)


def follow(
    connection: Connection, before: Subscription, after: Subscription, moment: Moment
) -> None:
    """Apply a new status of the subscription to its other invoices."""
    if before.status is after.status:
        return
    if after.status is SubscriptionStatus.SUSPENDED:
        put_aside(connection, after.id, moment, invoices.SUSPENDED)
    elif after.status is SubscriptionStatus.CANCELLED:
        give_up(connection, after.id, moment)
    elif before.status is SubscriptionStatus.SUSPENDED:
        take_up_again(connection, after.id, moment)


def give_up(connection: Connection, subscription_id: int, moment: Moment) -> int:
    """Void open invoices without an attempt in flight. Returns how many."""
    items = claims.lock_open(connection, subscription_id)
    return void(connection, items, invoices.CANCELLED, moment)


def void_what_is_open(
    connection: Connection, subscription_id: int, reason: str, moment: Moment
) -> dict[str, Any]:
    """Void open invoices, and those in flight as soon as they end unpaid.

    Returns data for the event: how many, and which may still be paid. Empty if nothing is open.
    """
    return _void_unless_paid(
        connection, claims.lock_open(connection, subscription_id), reason, moment
    )


def void_what_is_owed(
    connection: Connection, subscription_id: int, reason: str, moment: Moment
) -> dict[str, Any]:
    """Void as `void_what_is_open` does, also what was given up: a customer may be on its page."""
    items = claims.lock_open(connection, subscription_id)
    items += claims.lock_given_up(connection, subscription_id)
    return _void_unless_paid(connection, items, reason, moment)


def _void_unless_paid(
    connection: Connection, items: Sequence[DueInvoice], reason: str, moment: Moment
) -> dict[str, Any]:
    if not items:
        return {}
    voided = void(connection, items, reason, moment)
    flying = [item for item in items if is_in_flight(item)]
    _change(connection, flying, invoices.given_up_if_unpaid, _waits, moment)
    return {"voided": voided, "in_flight": [item.invoice.reference_id for item in flying]}


def void(connection: Connection, items: Sequence[DueInvoice], reason: str, moment: Moment) -> int:
    """Void the locked invoices without an attempt in flight. Returns how many."""
    end_prepared(connection, items, reason, moment)
    idle = [item for item in items if not is_in_flight(item)]
    return _change(connection, idle, lambda i: invoices.voided(i, reason), _is_void, moment)


def is_in_flight(item: DueInvoice) -> bool:
    return item.live is not None and item.live.status is AttemptStatus.SUBMITTED


def end_prepared(
    connection: Connection, items: Sequence[DueInvoice], reason: str, moment: Moment
) -> None:
    """End prepared attempts of locked invoices. Their subscriptions are locked too."""
    prepared = [live for i in items if (live := i.live) and not is_in_flight(i)]
    ended: list[tuple[Attempt, Attempt]] = [
        (attempt, withdrawn(attempt, reason, moment.now)) for attempt in prepared
    ]
    attempts.save_open(connection, ended, [])
    subscription_of = {item.invoice.id: item.invoice.subscription_id for item in items}
    said = moment.event(EventKind.ATTEMPT_NOT_CHARGED, reason=reason)
    history.write(
        connection,
        (Entry(said, subscription_of[a.invoice_id], a.invoice_id, a.id) for a in prepared),
    )


def release_held(connection: Connection, item: DueInvoice, moment: Moment) -> DueInvoice:
    """End an abandoned prepared attempt of a held invoice whose lease is over. The caller holds
    both locks.
    """
    live = item.live
    if live is None or live.status is not AttemptStatus.PREPARED or live.origin is Origin.LINK:
        return item
    is_over = live.lease_until is None or live.lease_until <= moment.now
    if item.invoice.next_attempt_at is not None or not is_over:
        return item
    end_prepared(connection, [item], item.invoice.reason or "left", moment)
    ended = withdrawn(live, item.invoice.reason or "left", moment.now)
    return replace(item, attempts=(*item.besides(live), ended))


def _change(
    connection: Connection,
    items: Sequence[DueInvoice],
    change: Callable[[Invoice], Invoice],
    tell: Callable[[Invoice, Moment], Event],
    moment: Moment,
) -> int:
    pairs = [(item.invoice, change(item.invoice)) for item in items]
    pairs = [(before, after) for before, after in pairs if before != after]
    attempts.save_open(connection, [], pairs)
    history.write(
        connection,
        (Entry(tell(after, moment), after.subscription_id, after.id) for _, after in pairs),
    )
    return len(pairs)


def _waits(invoice: Invoice, moment: Moment) -> Event:
    at = invoice.next_attempt_at
    return moment.event(
        EventKind.INVOICE_WAITING,
        reason=invoice.reason,
        next_attempt_at=at,
    )


def _is_void(invoice: Invoice, moment: Moment) -> Event:
    return moment.event(EventKind.INVOICE_VOIDED, reason=invoice.reason)
