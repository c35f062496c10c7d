"""The JSON Schema of each public event, built from the catalogue of `public_events`."""

from __future__ import annotations

from typing import Any, Final

from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.public_events import CATALOGUE, VERSION, Detail, PublicType
from billing_worker.domain.subscription import SubscriptionStatus

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_TEXT: Final = {"type": "string"}
_INSTANT: Final = {"type": "string", "format": "date-time"}
_INTEGER: Final = {"type": "integer"}
_AMOUNT: Final = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"}
_KINDS: Final = {"text": _TEXT, "integer": _INTEGER, "amount": _AMOUNT, "instant": _INSTANT}


def _or_null(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """Describe an object with these required properties. Receivers must ignore unknown ones."""
    return {"type": "object", "properties": properties, "required": sorted(properties)}


_CARD: Final = _object(
    {
        "last4": _or_null(_TEXT),
        "brand": _or_null(_TEXT),
        "expires": _or_null(_TEXT),
    }
)

SUBSCRIPTION: Final = _object(
    {
        "reference_id": _TEXT,
        "kind": {"enum": ["recurring", "one_off"]},
        "status": {"enum": [str(status) for status in SubscriptionStatus]},
        "held": {"type": "boolean"},
        "amount": _AMOUNT,
        "currency": _TEXT,
        "new_amount": _or_null(_AMOUNT),
        "new_amount_from": _or_null(_INSTANT),
        "interval": _TEXT,
        "interval_count": _INTEGER,
        "next_period": _INTEGER,
        "next_billing_at": _or_null(_INSTANT),
        "cancels_at": _or_null(_INSTANT),
        "ends_at": _or_null(_INSTANT),
        "handed_over_at": _or_null(_INSTANT),
        "description": _or_null(_TEXT),
        "card": _or_null(_CARD),
    }
)

INVOICE: Final = _object(
    {
        "reference_id": _TEXT,
        "status": {"enum": [str(status) for status in InvoiceStatus]},
        "amount": _AMOUNT,
        "currency": _TEXT,
        "period": _object({"number": _INTEGER, "start": _INSTANT, "end": _INSTANT}),
        "next_attempt_at": _or_null(_INSTANT),
        "paid_at": _or_null(_INSTANT),
        "description": _or_null(_TEXT),
    }
)


def schema(of: PublicType) -> dict[str, Any]:
    """Return the JSON Schema of a whole event of this type, with its envelope."""
    described = CATALOGUE[of]
    data = {
        "version": {"const": VERSION},
        "number": _INTEGER,
        "sequence": _INTEGER,
        "customer": _or_null(_TEXT),
        "subscription": _or_null(_TEXT),
        "invoice": _or_null(_TEXT),
        "state": _object({"subscription": _or_null(SUBSCRIPTION), "invoice": _or_null(INVOICE)}),
        **{detail.name: _detail(detail) for detail in described.details},
    }
    envelope = {"type": {"const": str(of)}, "timestamp": _INSTANT, "id": _TEXT}
    return {
        "$schema": DIALECT,
        "$id": f"urn:billing-worker:event:{of}:{VERSION}",
        "title": str(of),
        "description": described.meaning,
        **_object({**envelope, "data": _object(data)}),
    }


def _detail(detail: Detail) -> dict[str, Any]:
    return {**_or_null(_KINDS[detail.kind]), "description": detail.meaning}
