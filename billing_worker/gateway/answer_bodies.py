"""All answer bodies of the gateway, as marshmallow schemas.

They tolerate what gateway.md shows: unknown keys, missing optional keys, and PHP's `[]` or null for
an empty object. They are strict about fields that decide about money: no float, no NaN, no boolean
as a number, no duplicate key. A body that does not fit raises `UnreadableError`.

Each schema is made once: making one costs more than using it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, NoReturn

from marshmallow import EXCLUDE, Schema, ValidationError, fields, pre_load

from billing_worker.domain.card_setup import Page, PageStatement, StoredCard
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import Owner, SaleAnswer, Statement
from billing_worker.gateway import request_bodies

GATEWAY_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
"""Accepted ids. An id becomes part of a path and must not be able to change the path."""

BEARER: Final = re.compile(r"[\x21-\x7e]{1,8192}")
"""Characters that an Authorization header can hold."""


class UnreadableError(Exception):
    """A body does not have the shape of gateway.md. The message names the field, never a value."""


class UnfilteredError(Exception):
    """A list by reference is wrong or incomplete. The message says how that shows."""


# ---------------------------------------------------------------- the fields of answers


class _Amount(fields.Field[Decimal]):
    """Major units as an exact Decimal, from a JSON number or from plain decimal text."""

    _TEXT: Final = re.compile(r"-?[0-9]{1,16}(?:\.[0-9]{1,24})?")

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Decimal:
        # Exact types, because `isinstance(True, int)` is true.
        if type(value) is int and abs(value) < 10**16:
            return Decimal(value)
        if type(value) is Decimal and _is_plain(value):
            return value
        if type(value) is str and self._TEXT.fullmatch(value):
            return Decimal(value)
        raise ValidationError("not an exact amount")


def _is_plain(value: Decimal) -> bool:
    """Whether the number of digits is that of an amount: 1E+999999 is exact too. A float of PHP has
    up to 17 significant digits: 0.0030000000000000001.
    """
    exponent = value.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -24 and value.adjusted() < 16  # noqa: PLR2004


class _Text(fields.Field[str]):
    """Text that fits a database column: short and printable, so without NUL or lone surrogates."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> str:
        if type(value) is str and 0 < len(value) <= 255 and value.isprintable():  # noqa: PLR2004
            return value
        raise ValidationError("not a short text")


class _TrueOrFalse(fields.Field[bool]):
    """Accepts 1 and 0 too, as PHP writes them; marshmallow's Boolean also accepts "on", "yes"."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> bool:
        if type(value) in {bool, int} and value in {0, 1}:
            return bool(value)
        raise ValidationError("not true or false")


class _TextOrEmpty(_Text):
    """Reads empty text as None. It is for explanations; only the status decides about money."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        return None if value == "" else super()._deserialize(value)


class _Currency(_Text):
    """Accepts lower case, as some white labels write it."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> str:
        text = super()._deserialize(value)
        return text.upper() if text.isascii() else text


class _Id(fields.Field[str]):
    def _deserialize(self, value: Any, *_: Any, **__: Any) -> str:
        if type(value) is str and GATEWAY_ID.fullmatch(value):
            return value
        raise ValidationError("not a gateway id")


class _Lenient(fields.Field[Any]):
    """A value that decides nothing: an invalid one counts as missing."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        super().__init__(load_default=None)
        self._convert = convert

    def deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        return self._convert(value)


def _short_text_or_none(value: Any) -> str | None:
    fits = isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()  # noqa: PLR2004
    return value if fits else None


def _bearer_or_none(value: Any) -> Secret | None:
    return Secret(value) if isinstance(value, str) and BEARER.fullmatch(value) else None


def _token_or_none(value: Any) -> Secret | None:
    return Secret(value) if isinstance(value, str) and value else None


def _whole_number_or_none(value: Any) -> int | None:
    """Accept 12 and "12"; the gateway writes both."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,12}", value):
        return int(value)
    return value if type(value) is int and 0 <= value < 10**12 else None


def _object(value: Any) -> dict[str, Any]:
    """Return an object. PHP's `[]` and null, and any other value, count as an empty object."""
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- payment invoices


class _Incoming(Schema):
    class Meta:
        unknown = EXCLUDE


class _InvoiceAnswer(_Incoming):
    """The deciding fields of one payment invoice.

    The document is flattened before loading, because nested schemas take twice as long and this one
    is loaded for every answer.
    """

    id = _Id(required=True)
    self_link = fields.Raw(load_default=None)
    status = _Text(required=True)
    resolution = _TextOrEmpty(allow_none=True, load_default=None)
    reference_id = _Text(allow_none=True, load_default=None)
    amount = _Amount(allow_none=True, load_default=None)
    payment_amount = _Amount(allow_none=True, load_default=None)
    processed_amount = _Amount(allow_none=True, load_default=None)
    currency = _Currency(allow_none=True, load_default=None)
    test_mode = _TrueOrFalse(allow_none=True, load_default=None)
    moderation_required = _TrueOrFalse(allow_none=True, load_default=None)
    original_code = _Lenient(_short_text_or_none)
    bearer = _Lenient(_bearer_or_none)
    created = _Lenient(_whole_number_or_none)
    book = _Lenient(_short_text_or_none)
    create = _Lenient(_short_text_or_none)

    @pre_load
    def flatten(self, resource: Any, **_: Any) -> dict[str, Any]:
        if not isinstance(resource, dict):
            raise ValidationError("not a resource", "data")
        if resource.get("type", "payment-invoices") != "payment-invoices":
            raise ValidationError("not a payment invoice", "type")
        attributes = _object(resource.get("attributes"))
        flow = _object(attributes.get("flow_data"))
        metadata = _object(attributes.get("metadata"))
        return {
            **attributes,
            "id": resource.get("id"),
            "self_link": _object(resource.get("links")).get("self"),
            "original_code": _object(attributes.get("original_data")).get("original_resolution"),
            "bearer": _object(flow.get("metadata")).get("token"),
            "book": metadata.get(request_bodies.BOOK),
            "create": metadata.get(request_bodies.CREATE),
        }


_INVOICE: Final = _InvoiceAnswer()


def created_invoice(body: bytes) -> Statement:
    """Read the answer to a create. Its `links.self`, if given, must match its id."""
    document = _parse_object(body)
    invoice = _load(_INVOICE, document.get("data"))
    link = invoice["self_link"]
    if link is not None and not _leads_to(link, invoice["id"]):
        raise UnreadableError("links.self: not the path of this invoice")
    return _statement(invoice, _customer_reference(document))


def invoice(body: bytes) -> Statement:
    """Read the answer to a poll by id."""
    document = _parse_object(body)
    return _statement(_load(_INVOICE, document.get("data")), _customer_reference(document))


@dataclass(frozen=True, slots=True)
class Hint:
    """All that is read from a callback: which invoice to poll."""

    gateway_id: str
    test_mode: bool
    reference_id: str | None = None


class _Callback(_Incoming):
    id = _Id(required=True)
    test_mode = _TrueOrFalse(required=True)
    reference_id = _Lenient(_short_text_or_none)

    @pre_load
    def flatten(self, resource: Any, **_: Any) -> dict[str, Any]:
        if not isinstance(resource, dict):
            raise ValidationError("not a resource", "data")
        said = _object(resource.get("attributes"))
        return {
            "id": resource.get("id"),
            "test_mode": said.get("test_mode"),
            "reference_id": said.get("reference_id"),
        }


_CALLBACK: Final = _Callback()


def called_back(body: bytes) -> Hint:
    """Read which invoice a callback is about. The rest may have any shape: nothing reads it."""
    hint = _load(_CALLBACK, _data(body))
    return Hint(hint["id"], hint["test_mode"], hint["reference_id"])


FULL_PAGE: Final = 10
"""A list with so many rows may be incomplete: no smaller page size is known. One reference has one
invoice per create: usually one, seldom two."""


def invoices_of(body: bytes, reference_id: str) -> list[Statement]:
    """Return the invoices of a list by reference, newest last.

    Raises UnreadableError, or UnfilteredError when our invoice may be missing from the list. The
    vendor's public list library ignores an unknown filter and returns the newest invoices of all
    (docs/gateway.md §4). Such a list proves nothing about a missing invoice.
    """
    document = _parse_object(body)
    resources = document.get("data")
    if not isinstance(resources, list):
        raise UnreadableError("data: not a list")
    found = [_load(_INVOICE, resource) for resource in resources]
    if any(invoice["reference_id"] is None for invoice in found):
        raise UnreadableError("data: an invoice without reference_id")
    reason = _why_incomplete(document, found, reference_id)
    if reason is not None:
        raise UnfilteredError(reason)
    return [_statement(invoice) for invoice in sorted(found, key=_creation_time)]


def _why_incomplete(
    document: dict[str, Any], found: list[dict[str, Any]], reference_id: str
) -> str | None:
    if any(invoice["reference_id"] != reference_id for invoice in found):
        return "the list by reference holds other references: its filter was not obeyed"
    if _object(document.get("links")).get("next"):
        return "the list by reference continues on another page"
    if len(found) >= FULL_PAGE:
        return f"the list by reference holds {len(found)} invoices: it may have been cut off"
    if not found and reads_as_expression(reference_id):
        return "the gateway may read this reference as an expression: an empty list proves nothing"
    return None


def reads_as_expression(reference_id: str) -> bool:
    """Whether the vendor's list library misreads it: a leading `-` means "not", a comma "or"."""
    return reference_id.startswith("-") or "," in reference_id


def _creation_time(invoice: dict[str, Any]) -> int:
    """Return UNIX seconds as sort key. Sorting keeps the gateway's order for equal times."""
    return invoice["created"] or 0


# One leading slash: two would name another host.
_PATH_OF_AN_INVOICE = re.compile(r"(?:/[A-Za-z0-9_-]+)*/payment-invoices/(?P<id>[^/]+)")


def _leads_to(link: Any, gateway_id: str) -> bool:
    path = _PATH_OF_AN_INVOICE.fullmatch(link) if isinstance(link, str) else None
    return path is not None and path["id"] == gateway_id


def _statement(invoice: dict[str, Any], customer: str | None = None) -> Statement:
    return Statement(
        gateway_id=invoice["id"],
        status=invoice["status"],
        resolution=invoice["resolution"],
        reference_id=invoice["reference_id"],
        amount=invoice["amount"],
        payment_amount=invoice["payment_amount"],
        processed_amount=invoice["processed_amount"],
        currency=invoice["currency"],
        test_mode=invoice["test_mode"],
        moderation_required=bool(invoice["moderation_required"]),
        original_code=invoice["original_code"],
        bearer=invoice["bearer"],
        owner=Owner(invoice["book"], customer),
        create=invoice["create"],
        created_at=_instant_or_none(invoice["created"]),
    )


_LAST_SECOND: Final = 253_402_300_799  # of the year 9999


def _instant_or_none(seconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds and seconds <= _LAST_SECOND else None


def _customer_reference(document: dict[str, Any]) -> str | None:
    """Return our reference of the invoice's customer, or None if the gateway does not state it.

    Newer bodies link the customer that they include. Older ones have empty relationships; then the
    only included customer is the invoice's own.
    """
    related = _object(_object(document.get("data")).get("relationships"))
    linked = _object(_object(related.get("customer")).get("data")).get("id")
    included = document.get("included")
    customers = [
        resource
        for resource in map(_object, included if isinstance(included, list) else [])
        if resource.get("type") == "customers" and linked in (None, resource.get("id"))
    ]
    if len(customers) != 1:
        return None
    return _short_text_or_none(_object(customers[0].get("attributes")).get("reference_id"))


# ---------------------------------------------------------------- the card of a paid invoice


def _month_or_none(value: Any) -> int | None:
    month = _whole_number_or_none(value)
    return month if month and month <= 12 else None  # noqa: PLR2004


def _year_or_none(value: Any) -> int | None:
    """Read a card's year; the gateway writes "32" for 2032. None: not a plausible year."""
    year = _whole_number_or_none(value)
    if year is None:
        return None
    if year < 100:  # noqa: PLR2004
        return 2000 + year
    return year if 2000 <= year <= 2100 else None  # noqa: PLR2004


class _CardAnswer(_Incoming):
    token = _Lenient(_token_or_none)
    mask = _Lenient(_short_text_or_none)
    first = _Lenient(_short_text_or_none)
    last = _Lenient(_short_text_or_none)
    holder = _Lenient(_short_text_or_none)
    expiry_month = _Lenient(_month_or_none)
    expiry_year = _Lenient(_year_or_none)
    brand = _Lenient(_short_text_or_none)
    network = _Lenient(_short_text_or_none)
    issuer_name = _Lenient(_short_text_or_none)
    issuer_country = _Lenient(_short_text_or_none)


_CARD: Final = _CardAnswer()


def stored_card(body: bytes) -> StoredCard | None:
    """Read the card of a payment invoice; None if it names neither a card nor a token.

    Older bodies have `brand: "mastercard"`, newer ones `brand: null, network: "MASTERCARD"`.
    """
    attributes = _object(_object(_data(body)).get("attributes"))
    payload = _object(attributes.get("payload"))
    card = _load(_CARD, {**_object(payload.get("payment_card")), "token": payload.get("token")})
    brand = card.pop("network") or card["brand"]
    card["brand"] = brand.lower() if brand else None
    return StoredCard(**card) if any(card.values()) else None


# ---------------------------------------------------------------- an invoice that is paid on a page


def invoice_with_page(body: bytes, *, just_created: bool = False) -> PageStatement:
    """Read an invoice that is paid on a page, with its page, card and customer."""
    return PageStatement(
        created_invoice(body) if just_created else invoice(body),
        page=_page(body),
        card=stored_card(body),
    )


_PAGE_URL: Final = re.compile(r"https?://[\x21-\x7e]{1,2000}")


def _page(body: bytes) -> Page | None:
    """Return the page to send the customer's browser to, or None if there is no usable one."""
    flow = _object(_object(_object(_data(body)).get("attributes")).get("flow_data"))
    action, method, params = flow.get("action"), flow.get("method"), _object(flow.get("params"))
    if not isinstance(action, str) or not _PAGE_URL.fullmatch(action):
        return None
    given = {name: value for name, value in params.items() if value is not None}
    if isinstance(method, str):
        method = method.upper()
    if method not in ("GET", "POST") or not all(map(_is_form_value, given.values())):
        return None
    return Page(action, method, {str(name): str(value) for name, value in given.items()})


def _is_form_value(value: Any) -> bool:
    return isinstance(value, (str, int, Decimal)) and not isinstance(value, bool)


# ---------------------------------------------------------------- the answer to a sale


class _SaleOutcome(_Incoming):
    """Nested as in the only official example, or flat as in six clients (gateway.md §6)."""

    status = _Lenient(_short_text_or_none)
    resolution = _Lenient(_short_text_or_none)
    auth_payload = _Lenient(_object)
    active_payment = _Lenient(_object)

    @pre_load
    def flatten(self, body: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {**body, **_object(_object(body.get("data")).get("attributes"))}


_SALE_OUTCOME: Final = _SaleOutcome()


def sale_answer(body: bytes, *, http_status: int) -> SaleAnswer:
    """Read any JSON object: the answer is only a hint, and the invoice is polled afterwards."""
    outcome = _load(_SALE_OUTCOME, _parse_object(body))
    to_authorise = outcome["active_payment"].get("status") == "authorize_required"
    return SaleAnswer(
        http_status=http_status,
        status=outcome["status"],
        resolution=outcome["resolution"],
        needs_customer=bool(outcome["auth_payload"]) or to_authorise,
    )


# ---------------------------------------------------------------- errors


class _ErrorItem(_Incoming):
    title = _Lenient(_short_text_or_none)
    detail = _Lenient(_short_text_or_none)


_ERROR_ITEM: Final = _ErrorItem()


def _said_in_errors(value: Any) -> str | None:
    """Return the title of the first error object, or the first sentence of the first field."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        item = _load(_ERROR_ITEM, value[0])
        return item["title"] or item["detail"] or "no title"
    for field, sentences in _object(value).items():
        first = sentences[0] if isinstance(sentences, list) and sentences else sentences
        return _short_text_or_none(f"{field}: {first}")
    return None


class _ErrorAnswer(_Incoming):
    """The three shapes of gateway.md §1.3, and two of other white labels: `{"message", "errors":
    {field: [sentences]}}` and `{"code", "message"}`. Text in other places is not read.
    """

    errors = _Lenient(_said_in_errors)
    error = _Lenient(lambda value: _short_text_or_none(_object(value).get("message")))
    message = _Lenient(_short_text_or_none)
    error_type = _Lenient(_short_text_or_none)


_ERROR: Final = _ErrorAnswer()


def error_title(body: bytes) -> str | None:
    """Return what the gateway says is wrong, or None.

    A body that also has `data` contradicts itself: None.
    """
    try:
        parsed = _parse_object(body)
    except UnreadableError:
        return None
    if "data" in parsed:
        return None
    said = _load(_ERROR, parsed)
    return next(filter(None, (said[name] for name in _WHERE_SAID)), None)


_WHERE_SAID: Final = ("errors", "error", "message", "error_type")


# ---------------------------------------------------------------- JSON, exactly


def _parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 with exact decimals. Raises UnreadableError."""
    try:
        parsed = _DECODER.decode(body.decode("utf-8-sig"))
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise UnreadableError(f"not JSON ({type(error).__name__})") from None
    if not isinstance(parsed, dict):
        raise UnreadableError("not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers differ on duplicate keys (first or last value), so a duplicate is refused.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


_DECODER: Final = json.JSONDecoder(
    parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_unique
)


def _data(body: bytes) -> Any:
    return _parse_object(body).get("data")


def _load(schema: Schema, value: Any) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = schema.load(value)
    except ValidationError as error:
        raise UnreadableError(_first_fault(error)) from None
    return loaded


def _first_fault(error: ValidationError) -> str:
    name, faults = next(iter(error.messages_dict.items()))
    return f"{name}: {faults[0]}" if isinstance(faults, list) else name
