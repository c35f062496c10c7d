"""Ordinary import records, by the number."""

from __future__ import annotations

from datetime import datetime

from billing_worker.services.import_records.subscription import SubscriptionRecord, parse_record


def monthly(number: int, token: str, anchor: datetime) -> SubscriptionRecord:
    """9.99 USD a month from `anchor` on, of a customer with a card of their own."""
    return parse_record(
        {
            "reference_id": f"sub-{number}",
            "customer": {"reference_id": f"customer-{number}"},
            "card": {"token": f"{token}.{number}"},
            "amount": "9.99",
            "currency": "USD",
            "interval": "month",
            "anchor_at": anchor.isoformat(),
        }
    )
