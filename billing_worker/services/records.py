"""The import record: how a subscription is described from outside, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate

from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret

REFERENCE_LENGTH = 100
"""Leaves room for the period and attempt suffixes in the gateway's reference."""

_reference = validate.And(
    validate.Length(min=1, max=REFERENCE_LENGTH),
    validate.Regexp(r"^[!-~]+$", error="must be printable ASCII without spaces."),
)


@dataclass(frozen=True, slots=True)
class CustomerRecord:
    reference_id: str
    name: str | None
    email: str | None


@dataclass(frozen=True, slots=True)
class CardRecord:
    token: Secret
    mask: str | None
    brand: str | None
    expiry_month: int | None
    expiry_year: int | None


@dataclass(frozen=True, slots=True)
class SubscriptionRecord:
    reference_id: str
    customer: CustomerRecord
    card: CardRecord | None
    money: Money
    schedule: Schedule
    trial_end: datetime | None
    paid_through: datetime | None
    ends_after_periods: int | None
    description: str | None
    metadata: dict[str, Any]
    digest: str  # of the whole record: the same reference with another digest is a conflict


@dataclass(frozen=True, slots=True)
class Fault:
    field: str  # dotted path, "" for the record as a whole
    reason: str


class BadRecord(Exception):
    """A record that breaks rules: each fault with its field and a reason for a person."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.field}: {fault.reason}" for fault in faults))
        self.faults = faults


class _Aware(fields.AwareDateTime):
    default_error_messages = {  # noqa: RUF012 - marshmallow's way to word an error
        "invalid": "must be an ISO 8601 date and time, such as 2026-01-31T00:00:00Z.",
        "invalid_awareness": "needs a UTC offset, such as a final Z.",
    }


class _Strict(Schema):
    class Meta:
        unknown = RAISE


class _Customer(_Strict):
    reference_id = fields.String(required=True, validate=_reference)
    name = fields.String(load_default=None, allow_none=True, validate=validate.Length(max=200))
    email = fields.String(load_default=None, allow_none=True, validate=validate.Length(max=254))


class _Card(_Strict):
    token = fields.String(required=True, validate=validate.Length(min=1, max=512))
    mask = fields.String(load_default=None, allow_none=True, validate=validate.Length(max=32))
    brand = fields.String(load_default=None, allow_none=True, validate=validate.Length(max=32))
    expiry_month = fields.Integer(
        load_default=None, allow_none=True, validate=validate.Range(min=1, max=12)
    )
    expiry_year = fields.Integer(
        load_default=None, allow_none=True, validate=validate.Range(min=2000, max=2100)
    )


class _Record(_Strict):
    reference_id = fields.String(required=True, validate=_reference)
    customer = fields.Nested(_Customer, required=True)
    card = fields.Nested(_Card, load_default=None, allow_none=True)
    amount = fields.Raw(required=True)
    currency = fields.Raw(required=True)
    interval = fields.String(required=True, validate=validate.OneOf([unit.value for unit in Unit]))
    interval_count = fields.Integer(load_default=1, strict=True)
    anchor_at = _Aware(required=True)
    timezone = fields.String(load_default="UTC")
    trial_end = _Aware(load_default=None, allow_none=True)
    paid_through = _Aware(load_default=None, allow_none=True)
    ends_after_periods = fields.Integer(
        load_default=None, allow_none=True, strict=True, validate=validate.Range(min=1)
    )
    description = fields.String(
        load_default=None, allow_none=True, validate=validate.Length(max=500)
    )
    metadata = fields.Dict(keys=fields.String(), load_default=dict, allow_none=True)

    @post_load
    def build(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Let the domain check its own values, and report all it finds at once."""
        faults: dict[str, list[str]] = {}
        if data["trial_end"] is not None and data["trial_end"] < data["anchor_at"]:
            faults["trial_end"] = ["must not be before anchor_at."]
        data["money"] = _checked(faults, lambda: Money.parse(data["amount"], data["currency"]))
        data["schedule"] = _checked(
            faults,
            lambda: Schedule(
                data["trial_end"] or data["anchor_at"],
                Unit(data["interval"]),
                data["interval_count"],
                data["timezone"],
            ),
        )
        if faults:
            raise ValidationError(faults)
        return data


_RECORD = _Record()


def _checked(faults: dict[str, list[str]], build: Any) -> Any:
    try:
        return build()
    except InvalidInput as error:
        faults.setdefault(error.field, []).append(error.reason)
        return None


def parse_record(raw: Any) -> SubscriptionRecord:
    """Read one import record. Raises BadRecord with every fault that can be told at once."""
    if not isinstance(raw, Mapping):
        raise BadRecord([Fault("", "must be a JSON object.")])
    try:
        data = _RECORD.load(dict(raw))
    except ValidationError as error:
        messages = error.normalized_messages()  # type: ignore[no-untyped-call] # marshmallow
        raise BadRecord(list(_flattened(messages))) from None
    card = data["card"]
    return SubscriptionRecord(
        reference_id=data["reference_id"],
        customer=CustomerRecord(**data["customer"]),
        card=CardRecord(**{**card, "token": Secret(card["token"])}) if card else None,
        money=data["money"],
        schedule=data["schedule"],
        trial_end=data["trial_end"],
        paid_through=data["paid_through"],
        ends_after_periods=data["ends_after_periods"],
        description=data["description"],
        metadata=data["metadata"] or {},
        digest=_digest(data),
    )


def _flattened(messages: Any, path: str = "") -> Iterator[Fault]:
    if isinstance(messages, dict):
        for key, inner in messages.items():
            name = "" if key == "_schema" else str(key)
            yield from _flattened(inner, f"{path}.{name}".strip("."))
    else:
        yield from (Fault(path, str(message)) for message in messages)


def _digest(data: dict[str, Any]) -> str:
    """Of the meaning, not the spelling: "9.90" and "9.9", or two spellings of an instant, agree."""
    meaning = {
        **{name: data[name] for name in ("reference_id", "customer", "card", "description")},
        "money": str(data["money"]),
        "schedule": [
            data["schedule"].anchor.timestamp(),
            data["interval"],
            data["interval_count"],
            data["timezone"],
        ],
        "trial_end": data["trial_end"] and data["trial_end"].timestamp(),
        "paid_through": data["paid_through"] and data["paid_through"].timestamp(),
        "ends_after_periods": data["ends_after_periods"],
        "metadata": data["metadata"] or {},
    }
    canonical = json.dumps(meaning, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
