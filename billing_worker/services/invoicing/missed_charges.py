"""First charges that nobody made in time go through the catch-up rules a second time.

    claim ─▶ long past its date, and never sent ─▶ collect now │ on another date │ waive │ hold

The rules are asked when a period is opened; after dead workers, an unreachable gateway, switched-off
sales or a pause the answer is as old as the outage, and everything would be debited in one sweep.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import Connection

from billing_worker.domain import catch_up
from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.catch_up import CATCH_UP_RULE, Action, Diary, Planned
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.subscription import (
    COLLECTABLE,
    DuePeriod,
    Subscription,
    SubscriptionStatus,
)
from billing_worker.persistence import attempts, claims, history, subscriptions
from billing_worker.persistence import catch_up as catch_up_rows
from billing_worker.persistence.claims import AFTER_OLDER, DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.rows import trouble_of
from billing_worker.services.doorbell import ring_for
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.pause_collection import Moment
from billing_worker.services.ports import Ports

BY = "charge"

TROUBLE = f"{CATCH_UP_RULE}trouble"
"""The rule of an unplannable charge: it waits for a person."""

log = structlog.get_logger()


def decide_again(ports: Ports, subscription_ids: Collection[int]) -> None:
    """Date, waive or hold the missed charges of the subscriptions, and wake workers for those that
    are debited now.

    Safe to run twice and concurrently: a decided charge is not missed any more.
    """
    with ports.store.transaction() as connection:
        moment = Moment(ports.clock.now(), BY)
        agreed, unreadable = subscriptions.lock_these(connection, subscription_ids)
        missed = _missed(connection, subscription_ids, moment)
        for row in unreadable:
            _write(connection, _held(missed[row.id], row.reason), moment)
        diaries = catch_up_rows.diaries(connection, subscription_ids, moment.now)
        newest = catch_up_rows.newest_periods(connection, subscription_ids)
        to_charge: list[int] = []
        for subscription in agreed:
            items = missed[subscription.id]
            if subscription.status not in COLLECTABLE:
                _stop(connection, subscription, moment)
            elif items:
                decided = decide(items, newest[subscription.id], subscription, moment.now,
                                 diaries[subscription.id])  # fmt: skip
                if (error := decided.error) is not None:
                    whose = subscription.reference_id
                    log.error("billing.alert", kind=TROUBLE, subscription=whose, exc_info=error)
                _write(connection, decided.planned, moment)
                to_charge += [i.invoice.id for i, p in decided.planned if p.at == moment.now]
    ring_for(ports, to_charge)


@dataclass(frozen=True, slots=True)
class Decided:
    """The decisions about the missed charges of one subscription. After an `error` all are held."""

    planned: Sequence[tuple[DueInvoice, Planned]]
    error: Exception | None = None


def is_missed(item: DueInvoice, now: datetime) -> bool:
    """Return whether it was missed, has no worker and no open pay page."""
    return catch_up.was_missed(item.invoice, item.attempts, now) and _is_free(item.live, now)


def _is_free(live: Attempt | None, now: datetime) -> bool:
    if live is None:
        return True
    driven = live.lease_until is not None and live.lease_until > now
    return live.status is AttemptStatus.PREPARED and live.origin is not Origin.LINK and not driven


def decide(
    items: Sequence[DueInvoice],
    newest: int,
    subscription: Subscription,
    now: datetime,
    diary: Diary,
) -> Decided:
    """Decide about the missed charges of one subscription, given the oldest first.

    The sweep writes what this returns, and the preview shows it. `newest` is the number of the
    subscription's newest period.
    """
    planned: list[tuple[DueInvoice, Planned]] = []
    try:
        for waited in (True, False):
            group = [item for item in items if (item.invoice.reason == AFTER_OLDER) is waited]
            if group:
                periods = [_period(item.invoice) for item in group]
                some, diary = catch_up.plan_missed(
                    periods, newest, subscription, now, diary, waited_for_older=waited
                )
                planned += zip(group, some, strict=True)
    except Exception as error:  # noqa: BLE001 - the caller reports it: one subscription must not stop the others
        return Decided(_held(items, trouble_of(error)), error)
    return Decided(planned)


def _held(items: Sequence[DueInvoice], trouble: str) -> list[tuple[DueInvoice, Planned]]:
    reason = f"{TROUBLE}: {trouble}"
    return [(i, Planned(_period(i.invoice), Action.HOLD, TROUBLE, reason)) for i in items]


def _missed(
    connection: Connection, subscription_ids: Collection[int], moment: Moment
) -> dict[int, list[DueInvoice]]:
    """Return by subscription the missed charges without a worker, oldest first."""
    found: dict[int, list[DueInvoice]] = defaultdict(list)
    for item in claims.lock_open(connection, *subscription_ids):
        if is_missed(item, moment.now):
            found[item.invoice.subscription_id].append(item)
    for items in found.values():
        items.sort(key=lambda item: item.invoice.period_number)
    return found


def _stop(connection: Connection, subscription: Subscription, moment: Moment) -> None:
    """Stop wake-ups for an invoice that must not be charged automatically."""
    if subscription.status is SubscriptionStatus.CANCELLED:
        pause_collection.give_up(connection, subscription.id, moment)
        return
    suspended = subscription.status is SubscriptionStatus.SUSPENDED
    reason = invoices.SUSPENDED if suspended else invoices.PAUSED
    pause_collection.put_aside(connection, subscription.id, moment, reason)


def _period(invoice: Invoice) -> DuePeriod:
    return DuePeriod(invoice.period_number, invoice.period_start, invoice.period_end)


def _write(
    connection: Connection, decided: Sequence[tuple[DueInvoice, Planned]], moment: Moment
) -> None:
    idle = [item for item, planned in decided if planned.at != moment.now]
    pause_collection.end_prepared(connection, idle, "overdue", moment)
    pairs = [(item.invoice, _after(item.invoice, planned)) for item, planned in decided]
    attempts.save_open(connection, [], pairs)
    history.write(
        connection,
        (
            Entry.of_invoice(item.invoice, _said(item.invoice, planned, moment))
            for item, planned in decided
        ),
    )  # fmt: skip
    held = [(item, planned) for item, planned in decided if planned.action is Action.HOLD]
    if held:
        _tell_held(connection, held, moment)


def _after(invoice: Invoice, planned: Planned) -> Invoice:
    if planned.action is Action.WAIVE:
        return invoices.voided(invoice, planned.reason or planned.rule)
    return replace(
        invoice, reason=planned.reason, next_attempt_at=planned.at, enqueue_at=planned.at
    )


def _said(invoice: Invoice, planned: Planned, moment: Moment) -> Event:
    waived = planned.action is Action.WAIVE
    return moment.event(
        EventKind.INVOICE_VOIDED if waived else EventKind.INVOICE_WAITING,
        reason=planned.reason,
        next_attempt_at=planned.at,
        was_due_at=invoice.next_attempt_at,
        catch_up={"action": planned.action, "rule": planned.rule},
    )


def _tell_held(
    connection: Connection, held: Sequence[tuple[DueInvoice, Planned]], moment: Moment
) -> None:
    data: dict[str, Any] = {
        "periods": [held[0][0].invoice.period_number, held[-1][0].invoice.period_number],
        "count": len(held),
        "rules": sorted({planned.rule for _, planned in held}),
    }
    said = Event(EventKind.CATCH_UP_HELD, moment.now, moment.by, data, alert=True)
    history.write(connection, [Entry(said, held[0][0].invoice.subscription_id)])
