"""All request bodies for the gateway, as marshmallow schemas.

Each schema is made once: making one costs more than using it.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import simplejson
from marshmallow import Schema, fields, post_dump

from billing_worker.domain.secret import Secret
from billing_worker.gateway.port import CheckoutOrder, InstantOrder, Order, TokenisationOrder


class _ExactNumber(fields.Field[Decimal]):
    """A Decimal as a JSON number, as in the gateway's page: `1`, not `1.00`; never a float."""

    def _serialize(self, value: Decimal | None, *_: Any, **__: Any) -> int | Decimal | None:
        if value is None:
            return None
        return int(value) if value == value.to_integral_value() else value.normalize()


class _Revealed(fields.Field[Secret]):
    def _serialize(self, value: Secret | None, *_: Any, **__: Any) -> str | None:
        return value.reveal() if value else None


class _Outgoing(Schema):
    @post_dump
    def leave_out_what_was_not_given(self, body: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {name: value for name, value in body.items() if value is not None}


class _CustomerRequest(_Outgoing):
    reference_id = fields.String(attribute="customer_reference_id")
    name = fields.String(attribute="customer_name")
    email = fields.String(attribute="customer_email")
    phone = fields.String(attribute="customer_phone")


class _CreateRequest(_Outgoing):
    """The fields that all three kinds of payment invoice share. Dumps a `_Posting`."""

    test_mode = fields.Boolean(attribute="order.test_mode")
    reference_id = fields.String(attribute="order.reference_id")
    description = fields.String(attribute="order.description")
    currency = fields.String(attribute="order.money.currency")
    amount = _ExactNumber(attribute="order.money.amount")
    service = fields.String()
    customer = fields.Nested(_CustomerRequest, attribute="order")
    # Inside the attributes; the one page that prints it outside is wrong (gateway.md §2.1).
    callback_url = fields.String()
    metadata = fields.Function(lambda posting: _metadata(posting.order))


class _InstantRequest(_CreateRequest):
    token = _Revealed(attribute="order.card_token")
    gateway_options = fields.Constant({"cardgate": {"instant": True}})


class _TokenisationRequest(_CreateRequest):
    return_url = fields.String(attribute="order.return_url")
    gateway_options = fields.Constant({"cardgate": {"tokenize": True}})


class _CheckoutRequest(_CreateRequest):
    token = _Revealed(attribute="order.card_token")
    return_url = fields.String(attribute="order.return_url")
    flow = fields.Constant("charge")


class _SaleRequest(_Outgoing):
    """The instant sale has no attributes, but they must be an object and not a list."""


BOOK: Final = "book"
"""Key in our metadata, which the gateway echoes: the book that created the invoice."""

CREATE: Final = "create"
"""Key in our metadata: the create request that created the invoice."""


def _metadata(order: Order) -> dict[str, Any] | None:
    """Return the merchant's metadata with ours, which names the book and the create."""
    own = dict(order.metadata) if isinstance(order, TokenisationOrder) else {}
    said = {BOOK: order.book, CREATE: order.create}
    return own | {name: value for name, value in said.items() if value} or None


@dataclass(frozen=True, slots=True)
class _Posting:
    order: Order
    service: str
    callback_url: str | None


_CREATE: Final[dict[type[Order], _CreateRequest]] = {
    InstantOrder: _InstantRequest(),
    TokenisationOrder: _TokenisationRequest(),
    CheckoutOrder: _CheckoutRequest(),
}
_SALE: Final = _SaleRequest()


def create_request(
    order: Order, *, service: str, callback_url: str | None = None
) -> dict[str, Any]:
    """Return the body of the create request for this kind of order."""
    attributes = _CREATE[type(order)].dump(_Posting(order, service, callback_url))
    return {"data": {"type": "payment-invoices", "attributes": attributes}}


def sale_request() -> dict[str, Any]:
    return {"data": {"type": "sale-operation", "attributes": _SALE.dump({})}}


def encode(body: dict[str, Any]) -> bytes:
    """Encode as JSON; decimals keep every digit."""
    return simplejson.dumps(body, use_decimal=True).encode()
