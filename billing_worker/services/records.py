"""The import record: how a subscription is described from outside, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate

from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret

REFERENCE_LENGTH = 100
"""Leaves room for the period and attempt suffixes in the gateway's reference."""

MAX_PERIODS = 100_000
"""Every day for 270 years: a larger number is a typing error."""

is_reference = validate.And(
    validate.Length(min=1, max=REFERENCE_LENGTH),
    validate.Regexp(r"^[!-~]+\Z", error="must be printable ASCII without spaces."),
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

    first_period: int = field(init=False, compare=False)
    """Number of the first period that is charged. Raises InvalidInput where that cannot be."""

    digest: str = field(init=False, compare=False)
    """The same reference with another digest is a conflict.

    Of the meaning, not the spelling: "9.90" and "9.9", or two spellings of an instant, agree.
    """

    def __post_init__(self) -> None:
        paid_through = self.paid_through
        first = self.schedule.first_period_from(paid_through) if paid_through else 0
        self.schedule.period(first)  # A period past the year 9999 has no dates.
        object.__setattr__(self, "first_period", first)
        object.__setattr__(self, "digest", digest_of(self._meaning()))

    def _meaning(self) -> dict[str, Any]:
        schedule, card = self.schedule, self.card
        return {
            "reference_id": self.reference_id,
            "customer": _person(self.customer),
            "card": card and {**_fields_of(card), "token": card.token.reveal()},
            "description": self.description,
            "money": str(self.money),
            "schedule": [schedule.anchor.timestamp(), schedule.unit, schedule.count, schedule.tz],
            "trial_end": self.trial_end and self.trial_end.timestamp(),
            "paid_through": self.paid_through and self.paid_through.timestamp(),
            "ends_after_periods": self.ends_after_periods,
            "metadata": self.metadata,
        }

    def as_json(self, *, with_token: bool) -> dict[str, Any]:
        """The record as one writes it: `parse_record` of it has the same digest.

        Without the token it cannot be imported: that refuses a card that has none.
        """
        card = self.card and _fields_of(self.card)
        if card and self.card and with_token:
            card = {"token": self.card.token.reveal(), **card}
        return {
            "reference_id": self.reference_id,
            "customer": _person(self.customer),
            "card": card,
            "amount": f"{self.money.amount:f}",
            "currency": self.money.currency,
            "interval": str(self.schedule.unit),
            "interval_count": self.schedule.count,
            "anchor_at": _instant(self.schedule.anchor),
            "timezone": self.schedule.tz,
            "trial_end": _instant(self.trial_end),
            "paid_through": _instant(self.paid_through),
            "ends_after_periods": self.ends_after_periods,
            "description": self.description,
            "metadata": self.metadata,
        }


def _person(customer: CustomerRecord) -> dict[str, Any]:
    return {
        "reference_id": customer.reference_id,
        "name": customer.name,
        "email": customer.email,
    }


def _fields_of(card: CardRecord) -> dict[str, Any]:
    return {
        "mask": card.mask,
        "brand": card.brand,
        "expiry_month": card.expiry_month,
        "expiry_year": card.expiry_year,
    }


def _instant(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment else None


def digest_of(meaning: Any) -> str:
    canonical = json.dumps(meaning, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Fault:
    field: str  # dotted path, "" for the record as a whole
    reason: str


class BadRecord(Exception):
    """A record that breaks rules: each fault with its field and a reason for a person."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.field}: {fault.reason}" for fault in faults))
        self.faults = faults


class Aware(fields.AwareDateTime):
    default_error_messages = {  # noqa: RUF012 - marshmallow's way to word an error
        "invalid": "must be an ISO 8601 date and time, such as 2026-01-31T00:00:00Z.",
        "invalid_awareness": "needs a UTC offset, such as a final Z.",
    }


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def can_be_stored(value: Any) -> None:
    """Refuse what JSON can say and a database cannot: NUL, half a surrogate pair, not-a-number."""
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            raise ValidationError("must not contain NUL or lone surrogates.")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            can_be_stored(key)
            can_be_stored(inner)
    elif isinstance(value, list):
        for inner in value:
            can_be_stored(inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValidationError("must not contain NaN or infinity.")


def text(longest: int, *, required: bool = False) -> fields.String:
    """A text field; one that is not required may be absent or null."""
    length = validate.Length(min=1 if required else 0, max=longest)
    rules: list[Callable[[Any], Any]] = [length, can_be_stored]
    if required:
        return fields.String(required=True, validate=rules)
    return fields.String(load_default=None, allow_none=True, validate=rules)


def metadata() -> fields.Dict:
    return fields.Dict(
        keys=fields.String(), load_default=dict, allow_none=True, validate=can_be_stored
    )


class StrictSchema(Schema):
    class Meta:  # noqa: D106 - marshmallow's way to say it
        unknown = RAISE


class CustomerSchema(StrictSchema):
    reference_id = fields.String(required=True, validate=is_reference)
    name = text(200)
    email = text(254)


class CardSchema(StrictSchema):
    token = text(512, required=True)
    mask = text(32)
    brand = text(32)
    expiry_month = fields.Integer(
        load_default=None, allow_none=True, validate=validate.Range(min=1, max=12)
    )
    expiry_year = fields.Integer(
        load_default=None, allow_none=True, validate=validate.Range(min=2000, max=2100)
    )


class RecordSchema(StrictSchema):
    reference_id = fields.String(required=True, validate=is_reference)
    customer = fields.Nested(CustomerSchema, required=True)
    card = fields.Nested(CardSchema, load_default=None, allow_none=True)
    amount = fields.Raw(required=True)
    currency = fields.Raw(required=True)
    interval = fields.String(required=True, validate=validate.OneOf([unit.value for unit in Unit]))
    interval_count = fields.Integer(load_default=1, strict=True)
    anchor_at = Aware(required=True)
    timezone = fields.String(load_default="UTC")
    trial_end = Aware(load_default=None, allow_none=True)
    paid_through = Aware(load_default=None, allow_none=True)
    ends_after_periods = fields.Integer(
        load_default=None,
        allow_none=True,
        strict=True,
        validate=validate.Range(min=1, max=MAX_PERIODS),
    )
    description = text(500)
    metadata = metadata()

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


_RECORD = RecordSchema()


def _checked(faults: dict[str, list[str]], build: Any) -> Any:
    try:
        return build()
    except InvalidInput as error:
        faults.setdefault(error.field, []).append(error.reason)
        return None


def parse_record(raw: Any) -> SubscriptionRecord:
    """Read one import record. Raises BadRecord with every fault that can be told at once."""
    data = loaded(_RECORD, raw)
    try:
        return SubscriptionRecord(
            reference_id=data["reference_id"],
            customer=CustomerRecord(**data["customer"]),
            card=card_from(data["card"]),
            money=data["money"],
            schedule=data["schedule"],
            trial_end=data["trial_end"],
            paid_through=data["paid_through"],
            ends_after_periods=data["ends_after_periods"],
            description=data["description"],
            metadata=data["metadata"] or {},
        )
    except InvalidInput as error:
        raise BadRecord([Fault(error.field, error.reason)]) from None


def loaded(schema: Schema, raw: Any) -> dict[str, Any]:
    """`raw` as the schema reads it. Raises BadRecord."""
    if not isinstance(raw, Mapping):
        raise BadRecord([Fault("", "must be a JSON object.")])
    try:
        data: dict[str, Any] = schema.load(dict(raw))
    except ValidationError as error:
        messages = error.normalized_messages()  # type: ignore[no-untyped-call] # marshmallow
        raise BadRecord(list(_flattened(messages))) from None
    return data


def card_from(data: dict[str, Any] | None) -> CardRecord | None:
    return CardRecord(**{**data, "token": Secret(data["token"])}) if data else None


def _flattened(messages: Any, path: str = "") -> Iterator[Fault]:
    if isinstance(messages, dict):
        for key, inner in messages.items():
            name = "" if key == "_schema" else str(key)
            yield from _flattened(inner, f"{path}.{name}".strip("."))
    else:
        yield from (Fault(path, str(message)) for message in messages)
