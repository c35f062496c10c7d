"""What operators ask: how do we stand, and why is this invoice as it is?"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain.money import Money
from billing_worker.persistence import history, invoices, subscriptions, switches


def status(connection: Connection, now: datetime) -> dict[str, Any]:
    """Counts and sums by fate. Shape: {subscriptions, invoices: [{fate, currency, count,
    amount}], oldest_unknown_seconds, next_due_at, sales_on, paused_services, alerts}.
    """
    unknown_since = invoices.oldest_unknown(connection)
    due = subscriptions.earliest_due(connection)
    return {
        "subscriptions": subscriptions.count_by_status(connection),
        "invoices": _by_fate(invoices.summary(connection)),
        "oldest_unknown_seconds": (now - unknown_since).total_seconds() if unknown_since else None,
        "next_due_at": due.isoformat() if due else None,
        "sales_on": switches.sales_are_on(connection),
        "paused_services": switches.read(connection).paused,
        "alerts": [_alert(row) for row in history.alerts(connection, limit=10)],
    }


def fate_of(invoice_status: str, attempt_status: str | None, *, waits: bool) -> str:
    """One of the fates that no period may be without."""
    if invoice_status != "open":
        return invoice_status
    if attempt_status == "submitted":
        return "unknown"
    return "open, waiting for a person" if waits else "open, next attempt dated"


def _by_fate(rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        key = (fate_of(row.status, row.attempt_status, waits=bool(row.waits)), row.currency)
        count, minor = sums.get(key, (0, 0))
        sums[key] = (count + row.invoices, minor + int(row.minor))
    return [
        {
            "fate": fate,
            "currency": currency,
            "count": count,
            "amount": str(Money.from_minor(minor, currency).amount),
        }
        for (fate, currency), (count, minor) in sorted(sums.items())
    ]


def _alert(row: Row[Any]) -> dict[str, Any]:
    return {
        "at": row.at.isoformat(),
        "kind": row.kind,
        "invoice": row.invoice_reference,
        "data": {key: value for key, value in row.data.items() if key != "calls"},
    }


def explain(connection: Connection, reference: str) -> dict[str, Any] | None:
    """One invoice, whole: states, times, who decided, every wire call (redacted).

    `reference` is the invoice's own, one of its attempts', or the gateway's id. None: unknown.
    """
    invoice = invoices.find(connection, reference)
    if invoice is None:
        return None
    tries = invoices.attempts_of(connection, invoice.id)
    newest = tries[-1].status if tries else None
    return {
        "invoice": invoice.reference_id,
        "subscription": invoice.subscription_reference,
        "period": {
            "number": invoice.period_number,
            "start": invoice.period_start.isoformat(),
            "end": invoice.period_end.isoformat(),
            "timezone": invoice.timezone,
        },
        "amount": str(Money.from_minor(invoice.amount_minor, invoice.currency).amount),
        "currency": invoice.currency,
        "status": invoice.status,
        "fate": fate_of(invoice.status, newest, waits=invoice.next_attempt_at is None),
        "reason": invoice.reason,
        "next_attempt_at": _iso(invoice.next_attempt_at),
        "paid_at": _iso(invoice.paid_at),
        "attempts": [_attempt(row) for row in tries],
        "history": [_event(row) for row in history.of_invoice(connection, invoice.id)],
    }


def _attempt(row: Row[Any]) -> dict[str, Any]:
    return {
        "number": row.number,
        "reference_id": row.reference_id,
        "gateway_id": row.gateway_id,
        "status": row.status,
        "origin": row.origin,
        "outcome": row.outcome,
        "submitted_at": _iso(row.submitted_at),
        "settled_at": _iso(row.settled_at),
        "ask_again_at": _iso(row.look_at),
    }


def _event(row: Row[Any]) -> dict[str, Any]:
    return {
        "at": row.at.isoformat(),
        "kind": row.kind,
        "by": row.by,
        "alert": row.alert,
        "attempt": row.attempt_number,
        "data": row.data,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def described(row: Row[Any]) -> dict[str, Any]:
    """A subscription as `list` and `show` print it."""
    return {
        "reference_id": row.reference_id,
        "status": row.status,
        "held": row.held,
        "customer": row.customer_reference,
        "amount": str(Money.from_minor(row.amount_minor, row.currency).amount),
        "currency": row.currency,
        "every": f"{row.interval_count} {row.interval}",
        "anchor_at": row.anchor_at.isoformat(),
        "timezone": row.timezone,
        "next_period": row.next_period,
        "next_billing_at": _iso(row.next_billing_at),
        "card": {"mask": row.card_mask, "brand": row.card_brand} if row.card_id else None,
        "description": row.description,
    }


def show(connection: Connection, reference_id: str) -> dict[str, Any] | None:
    """A subscription with its invoices and its own history, or None."""
    row = subscriptions.find(connection, reference_id)
    if row is None:
        return None
    return described(row) | {
        "invoices": [
            {
                "reference_id": invoice.reference_id,
                "period": invoice.period_number,
                "start": invoice.period_start.isoformat(),
                "status": invoice.status,
                "reason": invoice.reason,
                "next_attempt_at": _iso(invoice.next_attempt_at),
                "paid_at": _iso(invoice.paid_at),
            }
            for invoice in invoices.of_subscription(connection, row.id)
        ],
        "history": [
            {"at": e.at.isoformat(), "kind": e.kind, "by": e.by, "data": e.data}
            for e in history.of_subscription(connection, row.id)
        ],
    }
