"""Marshmallow fields and schemas of records.

Each has a short path for values that are plainly right: marshmallow's own path took two thirds of
the time of an import.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from marshmallow import RAISE, Schema, ValidationError, fields, missing, validate

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import holds_card_data
from billing_worker.services.import_records import person

REFERENCE_LENGTH = 100
"""Leaves room for the suffixes of period and attempt in the gateway's reference."""

LONGEST_JSON = 65_536
"""Characters of the JSON of a command or of one record's metadata."""

DEEPEST = 32
"""Levels of nesting. Deeper JSON may exhaust a reader's stack."""

HOLDS_CARD_DATA = "must not hold a card number or a CVV."


def no_card_data(text: str) -> None:
    if holds_card_data(text):
        raise ValidationError(HOLDS_CARD_DATA)


is_reference = validate.And(
    validate.Length(min=1, max=REFERENCE_LENGTH),
    validate.Regexp(r"^[!-~]+\Z", error="must be printable ASCII without spaces."),
    no_card_data,
)
is_new_reference = validate.And(
    is_reference,
    # The gateway's lists may read a leading `-` as NOT and split at `,`. Charges are found by
    # reference.
    validate.Regexp(r"^[^-,][^,]*\Z", error="must not begin with - and must not have a comma."),
)
_PLAIN_REFERENCE = re.compile(f"[!-~]{{1,{REFERENCE_LENGTH}}}")
_PLAIN_NEW_REFERENCE = re.compile(f"(?!-)[!-+\\--~]{{1,{REFERENCE_LENGTH}}}")

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def can_be_stored(value: Any) -> None:
    """Refuse what JSON allows and a database cannot store (NUL, half a surrogate pair, NaN), and
    what it must not store: card numbers and card codes.
    """
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            raise ValidationError("must not contain NUL or lone surrogates.")
        no_card_data(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            can_be_stored(key)
            can_be_stored(inner)
            if not isinstance(inner, (Mapping, list)):
                # The name says what the digits do not: {"cvv": "123"}.
                no_card_data(f"{key}: {inner}")
    elif isinstance(value, list):
        for inner in value:
            can_be_stored(inner)
    elif isinstance(value, int):
        no_card_data(str(value))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValidationError("must not contain NaN or infinity.")


def is_too_deep(value: Any) -> bool:
    """Return whether it nests more than DEEPEST levels. Uses no stack."""
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


class NotPlain(Exception):
    """The short path cannot judge this value: marshmallow decides and words the error."""


@runtime_checkable
class _Plain(Protocol):
    def plainly(self, value: Any) -> Any:
        """Return the value as marshmallow does, for a value other than None.

        Raises NotPlain when in doubt, and whenever marshmallow refuses the value.
        """


class Reference(fields.String):
    def __init__(self) -> None:
        super().__init__(required=True, validate=self.rule)

    rule: validate.Validator = is_reference
    plain = _PLAIN_REFERENCE

    def plainly(self, value: Any) -> str:
        if type(value) is str and self.plain.fullmatch(value) and not holds_card_data(value):
            return value
        raise NotPlain


class NewReference(Reference):
    """A reference for a new object: the gateway is asked by it."""

    rule = is_new_reference
    plain = _PLAIN_NEW_REFERENCE


def _if_said(rule: Callable[[str], str]) -> Callable[[str | None], Any]:
    return lambda value: value is None or rule(value)


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
            and not holds_card_data(value)
        ):
            return value
        raise NotPlain


class _Said(_Text):
    """Empty text counts as absent: CSV knows no difference."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._deserialize(value, *args, **kwargs) or None

    def plainly(self, value: Any) -> str | None:
        return super().plainly(value) or None


def text(longest: int, *, required: bool = False) -> fields.String:
    """Return a text field. If it is not required, it may be absent or null."""
    if required:
        return _Text(longest, required=True)
    return _Text(longest, load_default=None, allow_none=True)


def words(longest: int) -> fields.String:
    """Return a field for optional text: absent, null and empty all read as None."""
    return _Said(longest, load_default=None, allow_none=True)


class _Checked(_Said):
    """Text that a rule judges, which raises InvalidInput."""

    def __init__(self, rule: Callable[[str], None], longest: int) -> None:
        self._rule = rule
        super().__init__(longest, load_default=None, allow_none=True)
        self.validators = [*self.validators, _if_said(self._judged)]

    def _judged(self, value: str) -> str:
        try:
            self._rule(value)
        except InvalidInput as error:
            raise ValidationError(f"{error.reason}.") from None
        return value

    def plainly(self, value: Any) -> str | None:
        said = super().plainly(value)
        return self._judged(said) if said else None


def person_name() -> fields.String:
    return _Checked(person.check_name, person.MAX_NAME)


def email() -> fields.String:
    return _Checked(person.check_email, person.MAX_EMAIL)


def phone() -> fields.String:
    return _Checked(person.check_phone, person.MAX_PHONE)


class Zone(fields.String):
    """Any text: the schedule checks the zone's name."""

    def plainly(self, value: Any) -> str:
        if type(value) is str:
            return value
        raise NotPlain


class Choice(fields.String):
    def __init__(self, values: list[str], **options: Any) -> None:
        self.values = frozenset(values)
        super().__init__(validate=validate.OneOf(values), **options)

    def plainly(self, value: Any) -> str:
        if type(value) is str and value in self.values:
            return value
        raise NotPlain


class Whole(fields.Integer):
    def __init__(self, least: int | None = None, most: int | None = None, **options: Any) -> None:
        self.least = -math.inf if least is None else least
        self.most = math.inf if most is None else most
        rules = [validate.Range(min=least, max=most)]
        super().__init__(validate=rules, **options)

    def plainly(self, value: Any) -> int:
        if type(value) is int and self.least <= value <= self.most:
            return value
        raise NotPlain


class Flag(fields.Boolean):
    def __init__(self, **options: Any) -> None:
        super().__init__(truthy={True}, falsy={False}, **options)

    def plainly(self, value: Any) -> bool:
        if type(value) is bool:
            return value
        raise NotPlain


class Price(fields.Raw):
    """Amount and currency as text: the domain parses them."""

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


def _is_short(value: Any) -> None:
    if len(json.dumps(value)) > LONGEST_JSON:
        raise ValidationError(f"must have at most {LONGEST_JSON} characters of JSON.")


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


def metadata() -> fields.Dict:
    return _Metadata()


class Nested(fields.Nested):
    def plainly(self, value: Any) -> dict[str, Any]:
        schema = self.schema
        if type(value) is dict and isinstance(schema, PlainSchema):
            return schema.plainly(value)
        raise NotPlain


class StrictSchema(Schema):
    class Meta:  # noqa: D106 - marshmallow's way to say it
        unknown = RAISE


class PlainSchema(StrictSchema):
    """A schema whose fields all have the short path. Subclasses call the hooks themselves."""

    @cached_property
    def _readers(self) -> dict[str, tuple[Callable[[Any], Any], bool]]:
        """Return by name how to read a value and whether it may be null."""
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
        """Load a record at a fifth of the cost of `load`.

        Raises NotPlain or ValidationError for everything that `load` refuses, and for some values
        that it accepts.
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
        if len(data) < len(readers):  # a required field is absent
            raise NotPlain
        return data
