"""Recovery of an invoice by people and by time: a manual retry, and the end of waiting."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Origin
from billing_worker.domain.dunning import POLICIES
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import LATE_MONEY, InvoiceStatus
from billing_worker.domain.outcome import Context, give_up, not_before
from billing_worker.domain.subscription import PAYABLE, Subscription
from billing_worker.domain.timings import Timings
from billing_worker.persistence import attempts, claims, history, subscriptions, switches
from billing_worker.persistence import invoices as stored_invoices
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import AWAY, Store
from billing_worker.services.attempts.retry_limits import Budget
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.pause_collection import Moment

GIVE_UP_BATCH = 500
GIVE_UP_AGAIN_AFTER = timedelta(hours=1)
RETRIABLE = PAYABLE

_USUAL_TIMINGS = Timings()

log = structlog.get_logger()


def retry_invoice(
    store: Store,
    clock: Clock,
    *,
    reference: str,
    by: str,
    why: str,
    timings: Timings = _USUAL_TIMINGS,
) -> dict[str, Any]:
    """Let a named person order one attempt on the default card: now, or when the wait for late
    money of an earlier one is over.

    It takes the same invoice slot and the same network limits as every attempt, and uses no step of
    the retry schedule. Returns {invoice, next_attempt_at}. Raises InvalidInput: `reference` if the
    invoice is not owed or an attempt is in progress, `rule` with the rule that forbids it. The
    rules are checked again at the time of the attempt.
    """
    now = clock.now()
    with store.transaction() as connection:
        subscription, item = _locked(connection, reference)
        item = pause_collection.release_held(connection, item, Moment(now, by))
        _require_free(item, subscription)
        _require_allowed(connection, item, now)
        after = replace(invoices.owed_again(item.invoice, now), next_origin=Origin.MANUAL)
        earliest = not_before(Origin.MANUAL, item.attempts, timings)
        if earliest is not None and earliest > now:
            after = replace(after, reason=LATE_MONEY, next_attempt_at=earliest, enqueue_at=earliest)
        attempts.save_open(connection, [], [(item.invoice, after)])
        event = Event(EventKind.RETRY_ORDERED, now, by, {"why": why, "origin": Origin.MANUAL})
        history.write(connection, [Entry(event, subscription.id, after.id)])
    at = after.next_attempt_at or now
    return {"invoice": after.reference_id, "next_attempt_at": at.isoformat()}


def choose_policy(
    store: Store, clock: Clock, *, subscription_reference: str, policy: str, by: str, why: str
) -> dict[str, Any]:
    """Give a subscription a retry schedule of its own, from the next decline on.

    Returns {subscription, policy}. Raises InvalidInput on `reference_id` or `policy`.
    """
    if policy not in POLICIES:
        raise InvalidInput("policy", f"must be one of {', '.join(POLICIES)}")
    now = clock.now()
    with store.transaction() as connection:
        subscription = subscriptions.lock(connection, subscription_reference)
        if subscription is None:
            raise InvalidInput(
                "reference_id", f"there is no subscription {subscription_reference!r}"
            )
        subscriptions.save(connection, subscription, replace(subscription, dunning_policy=policy))
        said = {"dunning_policy": policy, "before": subscription.dunning_policy, "why": why}
        event = Event(EventKind.SUBSCRIPTION_CHANGED, now, by, said)
        history.write(connection, [Entry(event, subscription.id)])
    return {"subscription": subscription_reference, "policy": policy}


def give_up_overdue(store: Store, clock: Clock) -> int:
    """End the recovery of invoices that have waited long enough for their customer.

    Returns how many were ended. Safe to run twice. Ends none while the book waits for lost
    decisions: one may be the customer's new card.
    """
    now = clock.now()
    with store.reading() as connection:
        if switches.waits_for_decisions(connection):
            return 0
        found = claims.overdue(connection, now, GIVE_UP_BATCH)
    return sum(
        _give_up_safely(store, invoice_id, reference, now) for invoice_id, reference in found
    )


def _give_up_safely(store: Store, invoice_id: int, reference: str, now: datetime) -> bool:
    """End one recovery. An error must not stop the following invoices."""
    try:
        return _give_up_one(store, invoice_id, reference, now)
    except AWAY:
        raise
    except Exception:
        log.exception("billing.alert", kind="recovery.crashed", subscription=reference)
        with store.transaction() as connection:
            claims.be_patient(connection, invoice_id, now + GIVE_UP_AGAIN_AFTER)
        return False


# --- retry ------------------------------------------------------------------------------------


def _locked(connection: Connection, reference: str) -> tuple[Subscription, DueInvoice]:
    row = stored_invoices.find(connection, reference)
    if row is None:
        raise InvalidInput("reference", f"there is no invoice {reference!r}")
    subscription = subscriptions.lock(connection, row.subscription_reference)
    item = claims.lock_one(connection, row.id)
    if subscription is None or item is None:
        raise InvalidInput("reference", "is gone")
    return subscription, item


def _require_free(item: DueInvoice, subscription: Subscription) -> None:
    if item.invoice.status not in {InvoiceStatus.OPEN, InvoiceStatus.UNCOLLECTIBLE}:
        raise InvalidInput("reference", f"the invoice is {item.invoice.status}")
    if subscription.status not in RETRIABLE:
        raise InvalidInput("reference", f"the subscription is {subscription.status}")
    if item.live is not None:
        under_way = f"{item.live.reference_id} is {item.live.status}"
        raise InvalidInput("reference", f"an attempt is under way: {under_way}")


def _require_allowed(connection: Connection, item: DueInvoice, now: datetime) -> None:
    if item.card_id is None:
        raise InvalidInput("rule", "card.usable: card_missing")
    forbidden = Budget(connection, [item.card_id], now).spend(
        item.card_id, item.invoice.money, item.invoice.id
    )
    if forbidden is not None:
        raise InvalidInput("rule", f"{forbidden.rule}: {forbidden.reason}")


# --- the end of patience ----------------------------------------------------------------------


def _give_up_one(store: Store, invoice_id: int, reference: str, now: datetime) -> bool:
    with store.transaction() as connection:
        subscription = subscriptions.lock(connection, reference)
        item = claims.lock_one(connection, invoice_id)
        if subscription is None or item is None or not _is_overdue(item, now):
            return False
        context = Context(now, "recover", Timings())
        after, moved, events = give_up(item.invoice, subscription, "patience.over", context)
        attempts.save_open(connection, [], [(item.invoice, after)])
        if moved != subscription:
            subscriptions.save(connection, subscription, moved)
            pause_collection.follow(connection, subscription, moved, Moment(now, "recover"))
        claims.stop_waiting(connection, [subscription.id], now)
        history.write(connection, [Entry(event, subscription.id, invoice_id) for event in events])
    return True


def _is_overdue(item: DueInvoice, now: datetime) -> bool:
    """Return whether the wait is over. An open page or a sale in flight may still pay it: its end
    comes first.
    """
    invoice = item.invoice
    return (
        invoice.status is InvoiceStatus.OPEN
        and item.live is None
        and invoice.give_up_at is not None
        and invoice.give_up_at <= now
    )
