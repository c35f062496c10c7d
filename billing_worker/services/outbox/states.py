"""The state of a subscription and of an invoice in public events."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row

from billing_worker.domain.money import Money
from billing_worker.domain.public_events import LONGEST_TEXT


def subscription_state(row: Row[Any]) -> dict[str, Any]:
    """Return SUBSCRIPTION of domain/public_schema.py: no token, and no mask beyond the last four
    digits.
    """
    return {
        "reference_id": row.reference_id,
        "kind": row.kind,
        "status": row.status,
        "held": row.held,
        "amount": str(Money.from_minor(row.amount_minor, row.currency).amount),
        "currency": row.currency,
        "new_amount": new_amount(row),
        "new_amount_from": _iso(row.new_amount_from),
        "interval": row.interval,
        "interval_count": row.interval_count,
        "next_period": row.next_period,
        "next_billing_at": _iso(row.next_billing_at),
        "cancels_at": _iso(row.cancels_at),
        "ends_at": _iso(row.ends_at),
        "handed_over_at": _iso(row.handed_over_at),
        "description": _short(row.description),
        "card": _card(row),
    }


def new_amount(row: Row[Any]) -> str | None:
    """Return what was agreed for periods that begin at or after `new_amount_from`."""
    later = row.new_amount_minor
    return None if later is None else str(Money.from_minor(later, row.currency).amount)


def _card(row: Row[Any]) -> dict[str, Any] | None:
    if row.card_id is None:
        return None
    dated = row.card_expiry_year is not None and row.card_expiry_month is not None
    return {
        "last4": row.card_mask[-4:] if row.card_mask else None,
        "brand": row.card_brand,
        "expires": f"{row.card_expiry_year}-{row.card_expiry_month:02}" if dated else None,
    }


def invoice_state(row: Row[Any]) -> dict[str, Any]:
    """Return INVOICE of domain/public_schema.py."""
    return {
        "reference_id": row.reference_id,
        "status": row.status,
        "amount": str(Money.from_minor(row.amount_minor, row.currency).amount),
        "currency": row.currency,
        "period": {
            "number": row.period_number,
            "start": row.period_start.isoformat(),
            "end": row.period_end.isoformat(),
        },
        "next_attempt_at": _iso(row.next_attempt_at),
        "paid_at": _iso(row.paid_at),
        "description": _short(row.description),
    }


def _short(text: str | None) -> str | None:
    return text[:LONGEST_TEXT] if text else text


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
