"""The import record: the outside description of a subscription, and its validation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from marshmallow import Schema, ValidationError, post_load

from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up_policy import Policy, default_policy
from billing_worker.domain.dunning import POLICIES
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.outgoing import notice
from billing_worker.domain.secret import Secret
from billing_worker.domain.subscription import near_miss
from billing_worker.gateway.redaction import legible
from billing_worker.services.import_records.fields import (
    DEEPEST,
    Aware,
    Choice,
    Flag,
    Nested,
    NewReference,
    NotPlain,
    PlainSchema,
    Price,
    Reference,
    Whole,
    Zone,
    email,
    is_too_deep,
    metadata,
    person_name,
    text,
    words,
)

COMES_FROM = frozenset({"from_book", "from_prefix"})
"""Fields of a record that name the book which has billed it."""

_PREFIX = re.compile("[a-z0-9-]{0,16}")

MAX_AGREED_PERIODS = 100_000
"""Daily periods for 270 years: a larger number is a typing error."""


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
class State:
    """The state and the policies of a subscription that another book has billed.

    All fields are optional. `first_number` is the number of the period that begins at the anchor:
    earlier numbers are in the references of another series or database, and the gateway would find
    those again. Raises InvalidInput on the field.
    """

    catch_up: Policy | None = None  # None: the default of such an agreement
    dunning: str | None = None
    notices: str | None = None
    held: bool = False
    first_number: int = 0
    paused_at: datetime | None = None
    resumes_at: datetime | None = None
    resumes_shifted: bool = False
    cancels_at: datetime | None = None
    new_amount: Money | None = None
    new_amount_from: datetime | None = None
    from_book: str | None = field(default=None, compare=False)
    from_prefix: str | None = field(default=None, compare=False)
    """Identity and prefix of the book that has billed it so far. The gateway is asked first for its
    charges. Not part of the digest.
    """

    def __post_init__(self) -> None:
        if self.from_prefix is not None and not _PREFIX.fullmatch(self.from_prefix):
            raise InvalidInput("from_prefix", "is no prefix of references")
        if self.paused_at is not None and self.held:
            raise InvalidInput("held", "cannot be with paused_at")
        if self.resumes_at is not None and self.paused_at is None:
            raise InvalidInput("resumes_at", "needs paused_at")
        if self.paused_at is not None and self.cancels_at is not None:
            raise InvalidInput("cancels_at", "cannot be with paused_at")
        if (self.new_amount is None) is not (self.new_amount_from is None):
            raise InvalidInput("new_amount_from", "must be together with new_amount")

    def as_json(self) -> dict[str, Any]:
        return {
            "catch_up": str(self.catch_up) if self.catch_up else None,
            "dunning": self.dunning,
            "notices": self.notices,
            "held": self.held,
            "first_number": self.first_number,
            "paused_at": _instant(self.paused_at),
            "resumes_at": _instant(self.resumes_at),
            "resumes_shifted": self.resumes_shifted,
            "cancels_at": _instant(self.cancels_at),
            "new_amount": None if self.new_amount is None else f"{self.new_amount.amount:f}",
            "new_amount_from": _instant(self.new_amount_from),
            "from_book": self.from_book,
            "from_prefix": self.from_prefix,
        }

    def said(self) -> dict[str, Any]:
        """Return what differs from a subscription that begins here."""
        if self == _BEGINS_HERE:
            return {}
        usual = _BEGINS_HERE.as_json()
        said = {name: value for name, value in self.as_json().items() if value != usual[name]}
        return {name: value for name, value in said.items() if name not in COMES_FROM}


_BEGINS_HERE = State()


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
    ends_at: datetime | None = None
    state: State = field(default_factory=State)

    first_period: int = field(init=False, compare=False)
    """Number of the first period to charge. Raises InvalidInput if there is none."""

    starts_at: datetime = field(init=False, compare=False)
    """Start of that period."""

    digest: str = field(init=False, compare=False)
    """Digest of the record's meaning. The same reference with another digest is a conflict.

    "9.90" and "9.9" agree, and two spellings of an instant agree.
    """

    def __post_init__(self) -> None:
        paid_through = self.paid_through
        first = self.schedule.first_period_from(paid_through) if paid_through else 0
        starts_at, _ = self.schedule.period(first)  # A period after the year 9999 has no dates.
        object.__setattr__(self, "starts_at", starts_at)
        object.__setattr__(self, "first_period", self.state.first_number + first)
        if self.ends_at is not None and self.ends_at <= starts_at:
            raise InvalidInput("ends_at", "is before the first period to be charged begins")
        object.__setattr__(self, "digest", digest_of(self._meaning()))

    @property
    def first_from_anchor(self) -> int:
        """Return `first_period`, counted from the anchor."""
        return self.first_period - self.state.first_number

    @property
    def is_over(self) -> bool:
        """Return whether all its periods were billed elsewhere."""
        return self.ends_after_periods is not None and self.first_period >= self.ends_after_periods

    @property
    def catch_up(self) -> Policy:
        return self.state.catch_up or default_policy(self.ends_after_periods)

    def snapped(self) -> SubscriptionRecord:
        """The record with a `paid_through` that just misses a boundary put on that boundary: the
        period that begins there is then charged.
        """
        meant = near_miss(self.schedule, self.paid_through) if self.paid_through else None
        return replace(self, paid_through=meant[0]) if meant else self

    def _meaning(self) -> dict[str, Any]:
        schedule, card = self.schedule, self.card
        return {
            "reference_id": self.reference_id,
            "customer": _person(self.customer),
            "card": card and {**_fields_of(card), "token": card.token.reveal()},
            "description": self.description,
            "money": str(self.money),
            "schedule": [
                schedule.anchor.timestamp(),
                schedule.unit,
                schedule.count,
                schedule.tz,
                *([] if schedule.day is None else [schedule.day]),
            ],
            "trial_end": self.trial_end and self.trial_end.timestamp(),
            "paid_through": self.paid_through and self.paid_through.timestamp(),
            "ends_after_periods": self.ends_after_periods,
            "metadata": self.metadata,
            # Absent if empty, as in records older than these fields.
            **({"ends_at": self.ends_at.timestamp()} if self.ends_at else {}),
            **self._state_said(),
        }

    def as_json(self, *, with_token: bool) -> dict[str, Any]:
        """Return the record as JSON: `parse_record` of it has the same digest.

        Without the token it cannot be imported: an import refuses a card without one.
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
            "billing_day": self.schedule.day,
            "trial_end": _instant(self.trial_end),
            "paid_through": _instant(self.paid_through),
            "ends_after_periods": self.ends_after_periods,
            "ends_at": _instant(self.ends_at),
            "description": self.description,
            "metadata": self.metadata,
            **self.state.as_json() | {"catch_up": str(self.catch_up)},
        }

    def _state_said(self) -> dict[str, Any]:
        """What its state says beyond what holds for every such agreement."""
        said = self.state.said()
        if self.catch_up == default_policy(self.ends_after_periods):
            said.pop("catch_up", None)
        return said


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


_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


def digest_of(meaning: Any) -> str:
    return hashlib.sha256(_canonical(meaning).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Fault:
    field: str  # dotted path; "" for the whole record
    reason: str


class BadRecord(Exception):
    """A record with faults: each has its field and a reason in words."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.field}: {fault.reason}" for fault in faults))
        self.faults = faults


class CustomerSchema(PlainSchema):
    reference_id = Reference()
    name = person_name()
    email = email()


class CardSchema(PlainSchema):
    token = text(512, required=True)
    mask = words(32)
    brand = words(32)
    expiry_month = Whole(1, 12, load_default=None, allow_none=True)
    expiry_year = Whole(2000, 2100, load_default=None, allow_none=True)


class RecordSchema(PlainSchema):
    reference_id = NewReference()
    customer = Nested(CustomerSchema, required=True)
    card = Nested(CardSchema, load_default=None, allow_none=True)
    amount = Price(required=True)
    currency = Price(required=True)
    interval = Choice([unit.value for unit in Unit], required=True)
    interval_count = Whole(load_default=1, strict=True)
    anchor_at = Aware(required=True)
    timezone = Zone(load_default="UTC")
    billing_day = Whole(1, 31, load_default=None, allow_none=True, strict=True)
    trial_end = Aware(load_default=None, allow_none=True)
    paid_through = Aware(load_default=None, allow_none=True)
    ends_after_periods = Whole(
        1, MAX_AGREED_PERIODS, load_default=None, allow_none=True, strict=True
    )
    ends_at = Aware(load_default=None, allow_none=True)
    description = words(500)
    metadata = metadata()
    catch_up = text(32)
    dunning = Choice(sorted(POLICIES), load_default=None, allow_none=True)
    notices = text(16)
    held = Flag(load_default=False)
    first_number = Whole(0, MAX_AGREED_PERIODS, load_default=0, strict=True)
    paused_at = Aware(load_default=None, allow_none=True)
    resumes_at = Aware(load_default=None, allow_none=True)
    resumes_shifted = Flag(load_default=False)
    cancels_at = Aware(load_default=None, allow_none=True)
    new_amount = Price(load_default=None, allow_none=True)
    new_amount_from = Aware(load_default=None, allow_none=True)
    from_book = words(32)
    from_prefix = words(16)

    def plainly(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        built: dict[str, Any] = self.build(super().plainly(raw))
        return built

    @post_load
    def build(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Build domain values from the fields, and collect every error that they raise."""
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
                data["billing_day"],
            ),
        )
        data["state"] = _checked(faults, lambda: _state(data))
        if faults:
            raise ValidationError(faults)
        return data


def _state(data: Mapping[str, Any]) -> State:
    return State(
        catch_up=None if data["catch_up"] is None else Policy.parse(data["catch_up"]),
        dunning=data["dunning"],
        notices=str(own) if (own := notice.chosen(data["notices"])) else None,
        held=data["held"],
        first_number=data["first_number"],
        paused_at=data["paused_at"],
        resumes_at=data["resumes_at"],
        resumes_shifted=data["resumes_shifted"],
        cancels_at=data["cancels_at"],
        new_amount=_new_amount(data),
        new_amount_from=data["new_amount_from"],
        from_book=data["from_book"],
        from_prefix=(data["from_prefix"] or "") if data["from_book"] else None,
    )


def _new_amount(data: Mapping[str, Any]) -> Money | None:
    if data["new_amount"] is None:
        return None
    try:
        return Money.parse(data["new_amount"], data["currency"])
    except InvalidInput as error:
        named = "new_amount" if error.field == "amount" else error.field
        raise InvalidInput(named, error.reason) from None


_RECORD = RecordSchema()


def _checked(faults: dict[str, list[str]], build: Any) -> Any:
    try:
        return build()
    except InvalidInput as error:
        faults.setdefault(error.field, []).append(error.reason)
        return None


def parse_record(raw: Any) -> SubscriptionRecord:
    """Read one import record. Raises BadRecord with every fault that is found at once."""
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
            ends_at=data["ends_at"],
            state=data["state"],
        )
    except InvalidInput as error:
        raise BadRecord([Fault(error.field, error.reason)]) from None


def loaded(schema: Schema, raw: Any) -> dict[str, Any]:
    """Return `raw` as read by the schema. Raises BadRecord."""
    if not isinstance(raw, Mapping):
        raise BadRecord([Fault("", "must be a JSON object.")])
    if is_too_deep(raw):
        raise BadRecord([Fault(_deep_in(raw), f"must be at most {DEEPEST} levels deep.")])
    if isinstance(schema, PlainSchema):
        with suppress(NotPlain, ValidationError):  # which then reports every error
            return schema.plainly(raw)
    try:
        data: dict[str, Any] = schema.load(dict(raw))
    except ValidationError as error:
        messages = error.normalized_messages()  # type: ignore[no-untyped-call] # marshmallow
        raise BadRecord(list(_flattened(messages))) from None
    return data


def _deep_in(raw: Mapping[Any, Any]) -> str:
    """Return the path of the field that nests too deeply."""
    deep = (name for name, value in raw.items() if is_too_deep([value]))
    return legible(str(next(deep, "")))


def card_from(data: dict[str, Any] | None) -> CardRecord | None:
    return CardRecord(**{**data, "token": Secret(data["token"])}) if data else None


def _flattened(messages: Any, path: str = "") -> Iterator[Fault]:
    if isinstance(messages, dict):
        for key, inner in messages.items():
            name = "" if key == "_schema" else legible(str(key))
            yield from _flattened(inner, f"{path}.{name}".strip("."))
    else:
        yield from (Fault(path, str(message)) for message in messages)
