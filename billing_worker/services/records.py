"""The import record: how a subscription is described from outside, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from marshmallow import RAISE, Schema, ValidationError, fields, missing, post_load, validate

from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up_policy import DEFAULT_POLICY, Policy
from billing_worker.domain.dunning import POLICIES
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret
from billing_worker.gateway.redaction import legible

REFERENCE_LENGTH = 100
"""Leaves room for the period and attempt suffixes in the gateway's reference."""

MAX_PERIODS = 100_000
"""Every day for 270 years: a larger number is a typing error."""

LONGEST = 65_536
"""Characters of the JSON of a command, or of one record's metadata."""

DEEPEST = 32
"""Levels of nesting; whoever reads deeper ones may run out of stack."""

is_reference = validate.And(
    validate.Length(min=1, max=REFERENCE_LENGTH),
    validate.Regexp(r"^[!-~]+\Z", error="must be printable ASCII without spaces."),
)
_PLAIN_REFERENCE = re.compile(f"[!-~]{{1,{REFERENCE_LENGTH}}}")


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
    """What a subscription has become elsewhere, and the policies it was given there.

    All of it is optional in a record. `first_number` is the number of the period that begins at
    the anchor: periods before it are in the invoice references of another series or another
    database, and the gateway would find those again. Raises InvalidInput on the field.
    """

    catch_up: Policy = DEFAULT_POLICY
    dunning: str | None = None
    held: bool = False
    first_number: int = 0
    paused_at: datetime | None = None
    cancels_at: datetime | None = None

    def __post_init__(self) -> None:
        if self.paused_at is not None and self.held:
            raise InvalidInput("held", "cannot be with paused_at")
        if self.paused_at is not None and self.cancels_at is not None:
            raise InvalidInput("cancels_at", "cannot be with paused_at")

    def as_json(self) -> dict[str, Any]:
        return {
            "catch_up": str(self.catch_up),
            "dunning": self.dunning,
            "held": self.held,
            "first_number": self.first_number,
            "paused_at": _instant(self.paused_at),
            "cancels_at": _instant(self.cancels_at),
        }

    def said(self) -> dict[str, Any]:
        """What differs from a subscription that begins here."""
        if self == _BEGINS_HERE:
            return {}
        usual = _BEGINS_HERE.as_json()
        return {name: value for name, value in self.as_json().items() if value != usual[name]}


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
    """Number of the first period that is charged. Raises InvalidInput where that cannot be."""

    starts_at: datetime = field(init=False, compare=False)
    """When that period begins."""

    digest: str = field(init=False, compare=False)
    """The same reference with another digest is a conflict.

    Of the meaning, not the spelling: "9.90" and "9.9", or two spellings of an instant, agree.
    """

    def __post_init__(self) -> None:
        paid_through = self.paid_through
        first = self.schedule.first_period_from(paid_through) if paid_through else 0
        starts_at, _ = self.schedule.period(first)  # A period past the year 9999 has no dates.
        object.__setattr__(self, "starts_at", starts_at)
        object.__setattr__(self, "first_period", self.state.first_number + first)
        if self.ends_at is not None and self.ends_at <= starts_at:
            raise InvalidInput("ends_at", "is before the first period to be charged begins")
        object.__setattr__(self, "digest", digest_of(self._meaning()))

    @property
    def first_from_anchor(self) -> int:
        """`first_period`, counted as the schedule counts."""
        return self.first_period - self.state.first_number

    @property
    def is_over(self) -> bool:
        """Whether all its periods have been billed elsewhere."""
        return self.ends_after_periods is not None and self.first_period >= self.ends_after_periods

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
            # Absent where nothing is said, as it was before there was anything to say.
            **({"ends_at": self.ends_at.timestamp()} if self.ends_at else {}),
            **self.state.said(),
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
            "ends_at": _instant(self.ends_at),
            "description": self.description,
            "metadata": self.metadata,
            **self.state.as_json(),
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


_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


def digest_of(meaning: Any) -> str:
    return hashlib.sha256(_canonical(meaning).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Fault:
    field: str  # dotted path, "" for the record as a whole
    reason: str


class BadRecord(Exception):
    """A record that breaks rules: each fault with its field and a reason for a person."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.field}: {fault.reason}" for fault in faults))
        self.faults = faults


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


def is_too_deep(value: Any) -> bool:
    """Whether it nests more than DEEPEST levels; itself it uses no stack."""
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            return False
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, (dict, Mapping)) else item)
            if isinstance(inner, (dict, list))
        ]
    return bool(level)


# --- fields ----------------------------------------------------------------------------------
#
# Each of them is marshmallow's, with a way around its machinery for a value that is plainly right:
# that machinery took two thirds of the time to read a book.


class NotPlain(Exception):
    """A value that may be right or wrong: marshmallow knows, and has the words for it."""


@runtime_checkable
class _Plain(Protocol):
    def plainly(self, value: Any) -> Any:
        """What marshmallow makes of a value other than None. Raises NotPlain when in doubt, and
        whenever it would refuse the value.
        """


class _Reference(fields.String):
    def __init__(self) -> None:
        super().__init__(required=True, validate=is_reference)

    def plainly(self, value: Any) -> str:
        if type(value) is str and _PLAIN_REFERENCE.fullmatch(value):
            return value
        raise NotPlain


class _Text(fields.String):
    def __init__(self, longest: int, **options: Any) -> None:
        self.shortest = 1 if options.get("required") else 0
        self.longest = longest
        length = validate.Length(min=self.shortest, max=longest)
        super().__init__(validate=[_if_said(length), can_be_stored], **options)

    def plainly(self, value: Any) -> str | None:
        if (
            type(value) is str
            and self.shortest <= len(value) <= self.longest
            and not _UNSTORABLE.search(value)
        ):
            return value
        raise NotPlain


class _Said(_Text):
    """Empty text says nothing: CSV knows no difference."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._deserialize(value, *args, **kwargs) or None

    def plainly(self, value: Any) -> str | None:
        return super().plainly(value) or None


def _if_said(rule: Callable[[str], str]) -> Callable[[str | None], Any]:
    return lambda value: value is None or rule(value)


class _Zone(fields.String):
    """Any text: the schedule knows the names."""

    def plainly(self, value: Any) -> str:
        if type(value) is str:
            return value
        raise NotPlain


class _Choice(fields.String):
    def __init__(self, values: list[str], **options: Any) -> None:
        self.values = frozenset(values)
        super().__init__(validate=validate.OneOf(values), **options)

    def plainly(self, value: Any) -> str:
        if type(value) is str and value in self.values:
            return value
        raise NotPlain


class _Whole(fields.Integer):
    def __init__(self, least: int | None = None, most: int | None = None, **options: Any) -> None:
        self.least = -math.inf if least is None else least
        self.most = math.inf if most is None else most
        rules = [validate.Range(min=least, max=most)]
        super().__init__(validate=rules, **options)

    def plainly(self, value: Any) -> int:
        if type(value) is int and self.least <= value <= self.most:
            return value
        raise NotPlain


class _Flag(fields.Boolean):
    def __init__(self, **options: Any) -> None:
        super().__init__(truthy={True}, falsy={False}, **options)

    def plainly(self, value: Any) -> bool:
        if type(value) is bool:
            return value
        raise NotPlain


class _Price(fields.Raw):
    """Amount and currency are for the domain to read."""

    def plainly(self, value: Any) -> Any:
        return value


class Aware(fields.AwareDateTime):
    default_error_messages = {  # noqa: RUF012 - marshmallow's way to word an error
        "invalid": "must be an ISO 8601 date and time, such as 2026-01-31T00:00:00Z.",
        "invalid_awareness": "needs a UTC offset, such as a final Z.",
    }

    def plainly(self, value: Any) -> datetime:
        if type(value) is not str:
            raise NotPlain
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise NotPlain from None
        if moment.tzinfo is None:
            raise NotPlain
        return moment


class _Metadata(fields.Dict):
    def __init__(self) -> None:
        super().__init__(
            keys=fields.String(),
            load_default=dict,
            allow_none=True,
            validate=[can_be_stored, _is_short],
        )

    def plainly(self, value: Any) -> dict[str, Any]:
        if type(value) is not dict or not all(type(key) is str for key in value):
            raise NotPlain
        if value:
            can_be_stored(value)
            _is_short(value)
        return dict(value)


class _Nested(fields.Nested):
    def plainly(self, value: Any) -> dict[str, Any]:
        schema = self.schema
        if type(value) is dict and isinstance(schema, PlainSchema):
            return schema.plainly(value)
        raise NotPlain


def text(longest: int, *, required: bool = False) -> fields.String:
    """A text field; one that is not required may be absent or null."""
    if required:
        return _Text(longest, required=True)
    return _Text(longest, load_default=None, allow_none=True)


def words(longest: int) -> fields.String:
    """Text about something that may say nothing: absent, null or empty, all read as None."""
    return _Said(longest, load_default=None, allow_none=True)


def metadata() -> fields.Dict:
    return _Metadata()


def _is_short(value: Any) -> None:
    if len(json.dumps(value)) > LONGEST:
        raise ValidationError(f"must have at most {LONGEST} characters of JSON.")


# --- schemas ---------------------------------------------------------------------------------


class StrictSchema(Schema):
    class Meta:  # noqa: D106 - marshmallow's way to say it
        unknown = RAISE


class PlainSchema(StrictSchema):
    """One whose fields all know what is plainly right. Hooks are for its subclass to call."""

    @cached_property
    def _readers(self) -> dict[str, tuple[Callable[[Any], Any], bool]]:
        """By name: how a value is read, and whether it may be null."""
        found: dict[str, tuple[Callable[[Any], Any], bool]] = {}
        for name, one in self.fields.items():
            if not isinstance(one, _Plain):
                raise TypeError(f"{name} does not know what is plainly right")
            found[name] = (one.plainly, one.allow_none)
        return found

    @cached_property
    def _absent(self) -> dict[str, Any]:
        return {
            name: one.load_default
            for name, one in self.fields.items()
            if one.load_default is not missing
        }

    def plainly(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """As `load`, at a fifth of its cost.

        Raises NotPlain or ValidationError for whatever `load` would refuse, and for some that it
        takes.
        """
        data = {name: it() if callable(it) else it for name, it in self._absent.items()}
        readers = self._readers
        for name, value in raw.items():
            if name not in readers:
                raise NotPlain
            read, may_be_null = readers[name]
            if value is not None:
                data[name] = read(value)
            elif may_be_null:
                data[name] = None
            else:
                raise NotPlain
        if len(data) < len(readers):  # something required is absent
            raise NotPlain
        return data


class CustomerSchema(PlainSchema):
    reference_id = _Reference()
    name = words(200)
    email = words(254)


class CardSchema(PlainSchema):
    token = text(512, required=True)
    mask = words(32)
    brand = words(32)
    expiry_month = _Whole(1, 12, load_default=None, allow_none=True)
    expiry_year = _Whole(2000, 2100, load_default=None, allow_none=True)


class RecordSchema(PlainSchema):
    reference_id = _Reference()
    customer = _Nested(CustomerSchema, required=True)
    card = _Nested(CardSchema, load_default=None, allow_none=True)
    amount = _Price(required=True)
    currency = _Price(required=True)
    interval = _Choice([unit.value for unit in Unit], required=True)
    interval_count = _Whole(load_default=1, strict=True)
    anchor_at = Aware(required=True)
    timezone = _Zone(load_default="UTC")
    trial_end = Aware(load_default=None, allow_none=True)
    paid_through = Aware(load_default=None, allow_none=True)
    ends_after_periods = _Whole(1, MAX_PERIODS, load_default=None, allow_none=True, strict=True)
    ends_at = Aware(load_default=None, allow_none=True)
    description = words(500)
    metadata = metadata()
    catch_up = text(32)
    dunning = _Choice(sorted(POLICIES), load_default=None, allow_none=True)
    held = _Flag(load_default=False)
    first_number = _Whole(0, MAX_PERIODS, load_default=0, strict=True)
    paused_at = Aware(load_default=None, allow_none=True)
    cancels_at = Aware(load_default=None, allow_none=True)

    def plainly(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        built: dict[str, Any] = self.build(super().plainly(raw))
        return built

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
        data["state"] = _checked(faults, lambda: _state(data))
        if faults:
            raise ValidationError(faults)
        return data


def _state(data: Mapping[str, Any]) -> State:
    return State(
        catch_up=DEFAULT_POLICY if data["catch_up"] is None else Policy.parse(data["catch_up"]),
        dunning=data["dunning"],
        held=data["held"],
        first_number=data["first_number"],
        paused_at=data["paused_at"],
        cancels_at=data["cancels_at"],
    )


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
            ends_at=data["ends_at"],
            state=data["state"],
        )
    except InvalidInput as error:
        raise BadRecord([Fault(error.field, error.reason)]) from None


def loaded(schema: Schema, raw: Any) -> dict[str, Any]:
    """`raw` as the schema reads it. Raises BadRecord."""
    if not isinstance(raw, Mapping):
        raise BadRecord([Fault("", "must be a JSON object.")])
    if is_too_deep(raw):
        raise BadRecord([Fault(_deep_in(raw), f"must be at most {DEEPEST} levels deep.")])
    if isinstance(schema, PlainSchema):
        with suppress(NotPlain, ValidationError):  # which is then told in full
            return schema.plainly(raw)
    try:
        data: dict[str, Any] = schema.load(dict(raw))
    except ValidationError as error:
        messages = error.normalized_messages()  # type: ignore[no-untyped-call] # marshmallow
        raise BadRecord(list(_flattened(messages))) from None
    return data


def _deep_in(raw: Mapping[Any, Any]) -> str:
    """The field that is to blame."""
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
