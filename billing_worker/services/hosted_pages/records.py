"""The records that order a page: for a tokenisation or for a pay link."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from marshmallow import ValidationError, fields, post_load, validate, validates

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.gateway.request_bodies import BOOK, CREATE
from billing_worker.services.import_records.fields import (
    StrictSchema,
    is_new_reference,
    is_reference,
    metadata,
    phone,
    text,
)
from billing_worker.services.import_records.subscription import (
    CustomerRecord,
    CustomerSchema,
    digest_of,
    loaded,
)


@dataclass(frozen=True, slots=True)
class TokenisationRecord:
    reference_id: str
    customer: CustomerRecord
    phone: str | None
    money: Money | None  # None: what the invoice asks for
    invoice: str | None
    description: str | None
    return_url: str | None
    metadata: dict[str, Any]
    digest: str  # the same reference with another digest is a conflict


@dataclass(frozen=True, slots=True)
class CheckoutRecord:
    invoice: str
    return_url: str | None


def _is_web_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or not url.isascii():
        raise ValidationError("must be an http(s) URL.")


_OF_AN_ATTEMPT = re.compile(r"-p\d+-a\d+$")


def _is_no_attempts(reference: str) -> None:
    """Refuse a reference that looks like an attempt's: a charge would find this payment as
    its own.
    """
    if _OF_AN_ATTEMPT.search(reference):
        raise ValidationError("must not end like the reference of an attempt (-p0-a1).")


def _return_url() -> fields.String:
    return fields.String(
        load_default=None,
        allow_none=True,
        validate=[validate.Length(max=2000), _is_web_address],
    )


class TokenisationSchema(StrictSchema):
    reference_id = fields.String(required=True, validate=[is_new_reference, _is_no_attempts])
    customer = fields.Nested(CustomerSchema, required=True)
    phone = phone()
    amount = fields.Raw(load_default=None)
    currency = fields.Raw(load_default=None)
    invoice = fields.String(load_default=None, allow_none=True, validate=is_reference)
    description = text(500)
    return_url = _return_url()
    metadata = metadata()

    @validates("metadata")
    def leaves_ours_alone(self, value: Mapping[str, Any] | None, **_: Any) -> None:
        taken = {BOOK, CREATE} & (value or {}).keys()
        if taken:
            raise ValidationError(f"must not have {', '.join(taken)}: the worker uses that itself.")

    @post_load
    def build(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        amount, currency = data.pop("amount"), data.pop("currency")
        data["money"] = None
        if data["invoice"] is not None and amount is None and currency is None:
            return data
        try:
            data["money"] = Money.parse(amount, currency)
        except InvalidInput as error:
            raise ValidationError({error.field: [error.reason]}) from None
        return data


class CheckoutSchema(StrictSchema):
    # The caller's own key, if any. The invoice slot already identifies the link.
    reference_id = fields.String(load_default=None, allow_none=True, validate=is_reference)
    invoice = fields.String(required=True, validate=validate.Length(min=1, max=160))
    return_url = _return_url()


_TOKENISATION = TokenisationSchema()
_CHECKOUT = CheckoutSchema()


def parse_tokenisation(raw: Mapping[str, Any]) -> TokenisationRecord:
    """Raises BadRecord with every fault that can be told at once."""
    data = loaded(_TOKENISATION, raw)
    told = data["metadata"] = data["metadata"] or {}
    meaning = {**data, "money": str(data["money"])}
    if not told:  # as older versions digest it
        del meaning["metadata"]
    data["customer"] = CustomerRecord(**data["customer"])
    return TokenisationRecord(**data, digest=digest_of(meaning))


def parse_checkout(raw: Mapping[str, Any]) -> CheckoutRecord:
    """Raises BadRecord with every fault that can be told at once."""
    data = loaded(_CHECKOUT, raw)
    return CheckoutRecord(data["invoice"], data["return_url"])
