"""Due subscriptions become open invoices."""

from __future__ import annotations

from datetime import timedelta

from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.subscription import DuePeriod, Subscription, open_next_period
from billing_worker.persistence import history, invoices, subscriptions
from billing_worker.persistence.history import Entry
from billing_worker.services.ports import Ports
from billing_worker.services.ring import ring_for

BATCH = 500
MAX_BATCHES = 20
"""One sweep opens at most 10,000 periods; the next one continues."""

MESSAGE_LOST_AFTER = timedelta(seconds=60)


def renew_due(ports: Ports) -> int:
    """Open the next period of every due subscription and ring for the invoices.

    Returns the number of invoices opened. Safe to run twice, at once, or not for days: due is
    `next_billing_at <= now`, and invoice and next date are committed together.
    """
    opened = 0
    for _ in range(MAX_BATCHES):
        claimed, invoice_ids = _renew_batch(ports)
        ring_for(ports, invoice_ids)
        opened += len(invoice_ids)
        if claimed < BATCH:
            break
    return opened


def _renew_batch(ports: Ports) -> tuple[int, list[int]]:
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        claimed = subscriptions.claim_due(connection, now, BATCH)
        due: list[tuple[Subscription, DuePeriod]] = []
        moves: list[tuple[Subscription, Subscription]] = []
        for subscription in claimed:
            period, moved = open_next_period(subscription, now)
            due.append((subscription, period))
            moves.append((subscription, moved))
        ring_at = now + max(ports.terms.stuck_after, MESSAGE_LOST_AFTER)
        opened = invoices.open_periods(connection, due, now, ring_at)
        subscriptions.advance(connection, moves)
        by_subscription = {subscription.id: (subscription, period) for subscription, period in due}
        history.write(
            connection,
            (
                Entry(
                    Event(
                        EventKind.INVOICE_OPENED,
                        now,
                        "renew",
                        _why_due(*by_subscription[subscription_id]),
                    ),
                    subscription_id,
                    invoice_id,
                )
                for invoice_id, subscription_id in opened
            ),
        )
    return len(claimed), [invoice_id for invoice_id, _ in opened]


def _why_due(subscription: Subscription, period: DuePeriod) -> dict[str, object]:
    schedule = subscription.schedule
    return {
        "rule": f"boundary {period.number} of every {schedule.count} {schedule.unit}",
        "anchor_at": schedule.anchor.isoformat(),
        "timezone": schedule.tz,
        "period": [period.start.isoformat(), period.end.isoformat()],
        "amount": str(subscription.money),
    }
