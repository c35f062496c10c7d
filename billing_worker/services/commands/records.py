"""What other services may ask for: each task with its arguments, and what is wrong with them.

A command's `reference_id` is the caller's own key: the same again is carried out once. For
`billing.subscribe` and `billing.charge_once` it also names what comes of the command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from marshmallow import (
    Schema,
    ValidationError,
    fields,
    post_load,
    validate,
    validates_schema,
)

from billing_worker.domain.calendar import Unit
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.secret import holds_card_data
from billing_worker.gateway.redaction import HIDDEN, legible, redact, redact_body
from billing_worker.services.cards.new_card import Scope
from billing_worker.services.hosted_pages.records import (
    CheckoutSchema,
    TokenisationSchema,
    parse_checkout,
    parse_tokenisation,
)
from billing_worker.services.import_records.fields import (
    DEEPEST,
    LONGEST_JSON,
    Aware,
    StrictSchema,
    is_new_reference,
    is_reference,
    is_too_deep,
    metadata,
    text,
)
from billing_worker.services.import_records.subscription import (
    BadRecord,
    CardRecord,
    CardSchema,
    CustomerRecord,
    CustomerSchema,
    Fault,
    RecordSchema,
    card_from,
    digest_of,
    loaded,
    parse_record,
)

VERSION = 1
"""Version of these schemas. A command of another version is refused and recorded."""

SHOWN_REFERENCE = 160


@dataclass(frozen=True, slots=True)
class Page:
    """Asks for a page that the customer is sent to; `services.hosted_pages` reads the record itself."""

    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """A valid command."""

    task: str
    reference_id: str
    record: Any  # SubscriptionRecord, or one of the classes below
    digest: str


@dataclass(frozen=True, slots=True)
class Change:
    subscription: str
    amount: str | None
    currency: str | None
    interval: str | None
    interval_count: int | None
    description: str | None
    catch_up: str | None
    notices: str | None
    ends_at: str | None
    amount_from: str | None
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Reschedule:
    subscription: str
    days: int | None
    billing_day: int | None
    free_periods: int | None
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    subscription: str
    until: str | None
    shift_anchor: bool
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    subscription: str
    shift_anchor: bool
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    subscription: str
    at_period_end: bool
    void_open: bool
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Uncancel:
    subscription: str
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class End:
    subscription: str
    void_open: bool
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    invoice: str
    by: str
    why: str | None
    decided_at: datetime | None = None  # kept with the command; the attempt is made now


@dataclass(frozen=True, slots=True)
class Describe:
    kind: str
    reference: str
    at: str | None = None  # a day or an instant: what was charged then, and why nothing else was


@dataclass(frozen=True, slots=True)
class CancelCharge:
    charge: str
    by: str
    why: str | None
    decided_at: datetime | None = None  # recorded with the command, which takes effect now


@dataclass(frozen=True, slots=True)
class Forgive:
    subscription: str
    by: str
    why: str | None
    decided_at: datetime | None = None  # kept with the command; it holds from now on all the same


@dataclass(frozen=True, slots=True)
class NoticeSent:
    subscription: str
    period: int
    amount: Any
    currency: Any
    sent_at: datetime | None
    by: str
    why: str | None
    decided_at: datetime | None = None  # as above


@dataclass(frozen=True, slots=True)
class RemoveCard:
    customer: str
    card_id: int
    by: str
    why: str | None
    decided_at: datetime | None = None  # as above


@dataclass(frozen=True, slots=True)
class UpdateCustomer:
    customer: str
    name: str | None
    email: str | None
    by: str
    why: str | None
    decided_at: datetime | None = None  # as above


@dataclass(frozen=True, slots=True)
class OneOff:
    reference_id: str
    customer: CustomerRecord
    card: CardRecord | None
    money: Money
    description: str | None
    metadata: dict[str, Any]
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReplaceCard:
    subscription: str
    card: CardRecord
    scope: Scope
    by: str
    why: str | None
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class UseCard:
    subscription: str
    card_id: int
    scope: Scope
    by: str
    why: str | None
    decided_at: datetime | None = None


class _Command(StrictSchema):
    reference_id = fields.String(required=True, validate=is_reference)
    decided_at = Aware(load_default=None, allow_none=True)


class _ToSubscription(_Command):
    subscription = fields.String(required=True, validate=is_reference)
    by = text(100)
    why = text(500)


class _Change(_ToSubscription):
    amount = fields.Raw(load_default=None)
    currency = fields.Raw(load_default=None)
    interval = fields.String(
        load_default=None, allow_none=True, validate=validate.OneOf([unit.value for unit in Unit])
    )
    interval_count = fields.Integer(load_default=None, allow_none=True, strict=True)
    description = text(500)
    catch_up = text(32)
    notices = text(16)  # empty leaves it to the settings
    ends_at = text(40)  # empty text removes it
    amount_from = text(40)  # empty text takes back what was agreed for later

    @validates_schema
    def names_a_change(self, data: Mapping[str, Any], **_: Any) -> None:
        said = {"reference_id", "subscription", "by", "why", "decided_at"}
        changes = sorted(set(self.fields) - said)
        if all(data.get(name) is None for name in changes):
            raise ValidationError(f"names no change: give one of {', '.join(changes)}.")


class _Reschedule(_ToSubscription):
    days = fields.Integer(load_default=None, allow_none=True, strict=True)
    billing_day = fields.Integer(load_default=None, allow_none=True, strict=True)
    free_periods = fields.Integer(load_default=None, allow_none=True, strict=True)


class _Pause(_ToSubscription):
    until = text(40)  # empty removes it
    shift_anchor = fields.Boolean(load_default=False, truthy={True}, falsy={False})


class _Resume(_ToSubscription):
    shift_anchor = fields.Boolean(required=True, truthy={True}, falsy={False})


class _Cancel(_ToSubscription):
    at_period_end = fields.Boolean(required=True, truthy={True}, falsy={False})
    void_open = fields.Boolean(load_default=False, truthy={True}, falsy={False})


class _End(_ToSubscription):
    void_open = fields.Boolean(load_default=False, truthy={True}, falsy={False})


class _Retry(_Command):
    invoice = fields.String(required=True, validate=is_reference)
    by = text(100)
    why = text(500)


class _Describe(StrictSchema):
    """A question: it needs no key of the caller's, because it changes nothing."""

    reference_id = fields.String(load_default="", validate=is_reference)
    subscription = fields.String(validate=is_reference)
    charge = fields.String(validate=is_reference)
    invoice = fields.String(validate=is_reference)
    customer = fields.String(validate=is_reference)
    at = text(40)

    @validates_schema
    def names_one_thing(self, data: Mapping[str, Any], **_: Any) -> None:
        kinds = sorted(set(self.fields) - {"reference_id", "at"})
        if len(data.keys() & set(kinds)) != 1:
            raise ValidationError(f"must name exactly one of {', '.join(kinds)}.")


class _NoticeSent(_ToSubscription):
    period = fields.Integer(required=True, strict=True)
    amount = fields.Raw(required=True)
    currency = fields.Raw(required=True)
    sent_at = Aware(load_default=None, allow_none=True)


class _ToCustomer(_Command):
    customer = fields.String(required=True, validate=is_reference)
    by = text(100)
    why = text(500)


class _RemoveCard(_ToCustomer):
    card_id = fields.Integer(required=True, strict=True)


class _UpdateCustomer(_ToCustomer):
    name = text(200)  # empty removes it
    email = text(254)


class _OneOff(_Command):
    reference_id = fields.String(required=True, validate=is_new_reference)
    customer = fields.Nested(CustomerSchema, required=True)
    card = fields.Nested(CardSchema, load_default=None, allow_none=True)
    amount = fields.Raw(required=True)
    currency = fields.Raw(required=True)
    description = text(500)
    metadata = metadata()

    @post_load
    def build(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        try:
            data["money"] = Money.parse(data.pop("amount"), data.pop("currency"))
        except InvalidInput as error:
            raise ValidationError({error.field: [error.reason]}) from None
        return data


class _CancelCharge(_Command):
    charge = fields.String(required=True, validate=is_reference)
    by = text(100)
    why = text(500)


class _GivesCard(_ToSubscription):
    scope = fields.Enum(Scope, by_value=True, load_default=Scope.SUBSCRIPTION)


class _ReplaceCard(_GivesCard):
    card = fields.Nested(CardSchema, required=True)


class _UseCard(_GivesCard):
    card_id = fields.Integer(required=True, strict=True)


def _one_off(data: dict[str, Any]) -> OneOff:
    return OneOff(
        reference_id=data["reference_id"],
        customer=CustomerRecord(**data["customer"]),
        card=card_from(data["card"]),
        money=data["money"],
        description=data["description"],
        metadata=data["metadata"] or {},
        decided_at=data["decided_at"],
    )


def _named(kind: type[Any]) -> Callable[[dict[str, Any]], Any]:
    def build(data: dict[str, Any]) -> Any:
        values = {name: value for name, value in data.items() if name != "reference_id"}
        if "card" in values:
            values["card"] = card_from(values["card"])
        return kind(**{**values, "by": f"command:{values['by'] or data['reference_id']}"})

    return build


def _described(data: dict[str, Any]) -> Describe:
    at = data.pop("at", None)
    [(kind, reference)] = ((k, v) for k, v in data.items() if k != "reference_id")
    return Describe(kind, reference, at)


DESCRIBE = "billing.describe"
_KINDS: Mapping[str, tuple[Schema, Callable[[dict[str, Any]], Any]]] = {
    "billing.change_subscription": (_Change(), _named(Change)),
    "billing.reschedule": (_Reschedule(), _named(Reschedule)),
    "billing.pause": (_Pause(), _named(Pause)),
    "billing.resume": (_Resume(), _named(Resume)),
    "billing.cancel": (_Cancel(), _named(Cancel)),
    "billing.uncancel": (_ToSubscription(), _named(Uncancel)),
    "billing.end": (_End(), _named(End)),
    "billing.retry": (_Retry(), _named(Retry)),
    DESCRIBE: (_Describe(), _described),
    "billing.forgive": (_ToSubscription(), _named(Forgive)),
    "billing.notice_sent": (_NoticeSent(), _named(NoticeSent)),
    "billing.remove_card": (_RemoveCard(), _named(RemoveCard)),
    "billing.update_customer": (_UpdateCustomer(), _named(UpdateCustomer)),
    "billing.charge_once": (_OneOff(), _one_off),
    "billing.cancel_charge": (_CancelCharge(), _named(CancelCharge)),
    "billing.replace_card": (_ReplaceCard(), _named(ReplaceCard)),
    "billing.use_card": (_UseCard(), _named(UseCard)),
}
SUBSCRIBE = "billing.subscribe"
START_TOKENISATION = "billing.start_tokenisation"
START_CHECKOUT = "billing.start_checkout"
_PAGES: Mapping[str, tuple[Schema, Callable[[Mapping[str, Any]], Any]]] = {
    START_TOKENISATION: (TokenisationSchema(), parse_tokenisation),
    START_CHECKOUT: (CheckoutSchema(), parse_checkout),
}
_SCHEMAS: Mapping[str, Schema] = {
    SUBSCRIBE: RecordSchema(),
    **{task: schema for task, (schema, _) in (*_KINDS.items(), *_PAGES.items())},
}
TASKS = tuple(_SCHEMAS)


def parse_command(task: str, arguments: Any) -> Command:
    """Read a command. Raises BadRecord with every fault that is found at once."""
    if task not in TASKS:
        raise BadRecord([Fault("task", f"is unknown; known are {', '.join(TASKS)}.")])
    if not isinstance(arguments, Mapping):
        raise BadRecord([Fault("", "must be one JSON object, alone in args or as kwargs.")])
    if is_too_deep(arguments) or len(json.dumps(arguments, default=str)) > LONGEST_JSON:
        raise BadRecord(
            [
                Fault(
                    "", f"must be at most {LONGEST_JSON} characters long and {DEEPEST} levels deep."
                )
            ]
        )
    record = _of_this_version(arguments)
    if task == SUBSCRIBE:
        subscription = parse_record(record)
        return Command(task, subscription.reference_id, subscription, subscription.digest)
    if task in _PAGES:
        return _page(task, record)
    schema, build = _KINDS[task]
    data = loaded(schema, record)
    return Command(task, data["reference_id"], build(data), _digest(record))


def _digest(record: Mapping[str, Any]) -> str:
    """Return the digest of the request without `decided_at`: whoever repeats a command may know
    that time only then.
    """
    return digest_of({name: value for name, value in record.items() if name != "decided_at"})


def _page(task: str, record: dict[str, Any]) -> Command:
    _, check = _PAGES[task]
    check(record)
    reference = record.get("reference_id")
    if reference is None:
        raise BadRecord([Fault("reference_id", "Missing data for required field.")])
    return Command(task, reference, Page(record), digest_of(record))


def _of_this_version(arguments: Mapping[str, Any]) -> dict[str, Any]:
    record = dict(arguments)
    version = record.pop("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise BadRecord([Fault("version", f"must be {VERSION}; this worker knows no other.")])
    return record


def reference_in(arguments: Any) -> str | None:
    """Return the caller's key if it is readable, to find a refused command."""
    reference = arguments.get("reference_id") if isinstance(arguments, Mapping) else None
    return legible(redact(reference))[:SHOWN_REFERENCE] if isinstance(reference, str) else None


def shown(task: str, arguments: Any) -> Any:
    """Return arguments as recorded: known fields without tokens, and the names of the others.

    An unknown field may hold anything, for example a token under a misspelt name.
    """
    if not isinstance(arguments, Mapping) or is_too_deep(arguments):
        return HIDDEN
    kept = _shown_fields(_SCHEMAS.get(task), arguments)
    if holds_card_data(json.dumps(kept, ensure_ascii=False)):
        return HIDDEN
    return kept if len(json.dumps(kept)) <= LONGEST_JSON else {"": "too long to be kept"}


_RECORD = RecordSchema()
_FREE = {"reference_id": fields.String(), "version": fields.Integer()}


def _shown_fields(schema: Schema | None, values: Mapping[str, Any]) -> dict[str, Any]:
    known: Mapping[str, Any] = _FREE | (schema.fields if schema else {})
    return {
        legible(str(name))[:SHOWN_REFERENCE]: HIDDEN
        if name == "token"
        else _shown_value(known.get(name), value)
        for name, value in values.items()
    }


def _shown_value(field: Any, value: Any) -> Any:
    if value is None:
        return None
    has_fields = isinstance(field, (fields.Nested, fields.Dict))
    if field is None or has_fields != isinstance(value, Mapping) or isinstance(value, list):
        return HIDDEN
    if isinstance(field, fields.Nested):
        return _shown_fields(field.schema, value)
    return _storable(redact_body(value))


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return legible(value)
    if isinstance(value, dict):
        return {legible(str(name)): _storable(inner) for name, inner in value.items()}
    return [_storable(inner) for inner in value] if isinstance(value, list) else value
