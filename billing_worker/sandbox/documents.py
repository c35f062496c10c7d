"""The bodies of the documented answers, key by key, with PHP's `[]` for an empty object.

The shapes are those of real bodies. The answer to a create is that of the page "Card Payments with
Tokenisation". The answer to a poll is that of the fullest captured body (the newest generation of
this API). The answer to a sale is as the clients of several white labels read it. tests/sandbox
compares all of them with those bodies.
"""

from __future__ import annotations

import html
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from billing_worker.sandbox import wire
from billing_worker.sandbox.card_outcomes import SaleAnswer
from billing_worker.sandbox.invoices import Invoice, serial

Json = dict[str, Any]

_CARD: Final[Json] = {
    "last": "0000",
    "mask": "512381******0000",
    "type": "CREDIT",
    "brand": "mastercard",
    "first": "512381",
    "holder": "JANE DOE",
    "card_id": "card_sandbox000000001",
    "network": "MASTERCARD",
    "expiry_year": "32",
    "issuer_name": "FIRST DATA CORPORATION",
    "expiry_month": "12",
    "verification": [],
    "issuer_country": "US",
}

_AUTH_PAYLOAD: Final[Json] = {
    "action": "https://acs.example.com/challenge",
    "method": "POST",
    "params": {"creq": "c2FuZGJveA"},
}


def created(invoice: Invoice) -> Json:
    """Return the answer to a create."""
    attributes: Json = {
        "serial_number": serial(invoice.number),
        "status": invoice.status,
        "resolution": invoice.resolution,
        "moderation_required": invoice.outcome.moderated,
        "amount": wire.number(invoice.amount),
        "payment_amount": wire.number(invoice.payment_amount),
        "currency": invoice.currency,
        "service_currency": invoice.currency,
        "reference_id": invoice.reference_id,
        "test_mode": invoice.test_mode,
        "fee": wire.number(invoice.payment_amount - invoice.amount),
        "deposit": wire.number(invoice.amount),
        **_processed(invoice),
        "refunded_amount": None,
        "metadata": invoice.order.metadata or [],
        "flow_data": _flow_data(invoice),
        "flow": "hpp",
        "payment_flow": "charge",
        "created": int(invoice.created_at.timestamp()),
        "updated": int(invoice.updated_at.timestamp()),
        "payload": None,
        "description": invoice.order.description,
        "descriptor": f"SANDBOX:Order №:{invoice.reference_id}",
        "callback_url": invoice.order.callback_url,
        "return_url": invoice.order.return_url,
        "original_data": None,
        "rrn": None,
        "approval_code": None,
    }
    return {"data": _resource(invoice, attributes)}


def looked_up(invoice: Invoice) -> Json:
    """Return the answer to a poll; a callback has the same body (gateway.md §5)."""
    attributes: Json = {
        "status": invoice.status,
        "resolution": invoice.resolution,
        "moderation_required": invoice.outcome.moderated,
        "amount": wire.number(invoice.amount),
        "payment_amount": wire.number(invoice.payment_amount),
        "currency": invoice.currency,
        "service_amount": wire.number(invoice.amount),
        "payment_service_amount": wire.number(invoice.payment_amount),
        "exchange_rate": 1,
        "service_currency": invoice.currency,
        "reference_id": invoice.reference_id,
        "test_mode": invoice.test_mode,
        "fee": wire.number(invoice.payment_amount - invoice.amount),
        "deposit": wire.number(invoice.amount),
        **_processed(invoice),
        "refunded_amount": None,
        "refunded_fee": None,
        "refunded": None,
        "failed": _seconds(invoice.failed_at),
        "metadata": invoice.order.metadata or [],
        "flow_data": _flow_data(invoice),
        "flow": "hpp",
        "payment_flow": "charge",
        "created": int(invoice.created_at.timestamp()),
        "updated": int(invoice.updated_at.timestamp()),
        "payload": _payload(invoice),
        "description": invoice.order.description,
        "descriptor": None,
        "callback_url": invoice.order.callback_url,
        "return_url": invoice.order.return_url,
        "return_urls": invoice.order.return_urls or [],
        "original_data": _original_data(invoice),
        **_bank_numbers(invoice),
        "approval_code": None,
        "reserved_amount": None,
        "reserve_expires": None,
        "unreserved": None,
        "source": "merchant_api",
        "callback_logs": [],
        "charged_back_amount": None,
        "charged_back": None,
        "resolution_message": None,
        "hpp_url": _page_url(invoice),
        "refunds": [],
        "reserves": [],
        "reserve_options": None,
        "processed_unreserve": None,
        "processed_reserve_cancel": None,
        "reserve_cancelled": None,
    }
    return {"data": _resource(invoice, attributes), "included": [_customer(invoice)]}


def listed(invoices: list[Invoice]) -> Json:
    """Return the answer to a list request.

    It has few fields on purpose, like the only known body: test mode and bearer need a poll.
    """
    return {"data": [_summary(invoice) for invoice in invoices]}


def _summary(invoice: Invoice) -> Json:
    return {
        "type": "payment-invoices",
        "id": invoice.gateway_id,
        "attributes": {
            "status": invoice.status,
            "resolution": invoice.resolution,
            "reference_id": invoice.reference_id,
            "amount": wire.number(invoice.amount),
            "currency": invoice.currency,
            "created": int(invoice.created_at.timestamp()),
            "updated": int(invoice.updated_at.timestamp()),
        },
    }


def sold_flat(invoice: Invoice) -> Json:
    return {
        "status": invoice.status,
        "resolution": invoice.resolution,
        **({"auth_mode": "3ds"} if _asks_for_3ds(invoice) else {}),
        **_auth_payload(invoice),
    }


def sold_nested(invoice: Invoice) -> Json:
    outcome = {"status": invoice.status, "resolution": invoice.resolution}
    payment = {**outcome, "status": "authorize_required"} if _asks_for_3ds(invoice) else outcome
    attributes: Json = {
        "amount": wire.number(invoice.amount),
        "currency": invoice.currency,
        "description": invoice.order.description,
        "service": "payment_card",
        "options": {},
        "customer": {"reference_id": invoice.order.customer.reference_id},
        "repeatable": True,
        "flow": "charge",
        **outcome,
        "active_request": outcome,
        "active_payment": payment,
        "auto_repay": False,
        "metadata": {"fee": "0.00", "fee_strategy": "external"},
        "form_data": [],
    }
    payment_terms = {"fee": "0.00", "feeStrategy": "external"}
    return {
        "data": {"id": invoice.session_id, "attributes": attributes, "payment": payment_terms},
        **_auth_payload(invoice),
    }


def payment_page(invoice: Invoice) -> str:
    """Return the hosted page as HTML, with a button that pays as the customer."""
    title = html.escape(f"Pay {invoice.payment_amount} {invoice.currency}")
    reference = html.escape(invoice.reference_id)
    return (
        f"<!doctype html><title>{title}</title><h1>{title}</h1><p>Order {reference}</p>"
        f'<form method="post" action="/_sandbox/pay/{invoice.gateway_id}">'
        "<button>Pay</button></form>"
    )


def _resource(invoice: Invoice, attributes: Json) -> Json:
    return {
        "type": "payment-invoices",
        "id": invoice.gateway_id,
        "attributes": attributes,
        "relationships": _relationships(invoice),
        "links": {"self": f"/api/payment-invoices/{invoice.gateway_id}"},
    }


def _relationships(invoice: Invoice) -> Json:
    related = {
        "payment-service": _link("payment-services", invoice.order.service),
        "payment-method": _link("payment-methods", "payment_card"),
        "customer": _link("customers", invoice.customer_id),
    }
    # Only the sample of a processed invoice has it (gateway.md §2.2).
    if invoice.processed_at:
        related["active-payment"] = _link("payments", f"pay_{serial(invoice.number)}")
    return related


def _link(kind: str, identity: str) -> Json:
    return {"data": {"type": kind, "id": identity}}


def _flow_data(invoice: Invoice) -> Json:
    metadata = {"sid": invoice.session_id}
    if invoice.order.instant:
        metadata["token"] = invoice.bearer
    return {"action": _page_url(invoice), "method": "GET", "params": [], "metadata": metadata}


def _page_url(invoice: Invoice) -> str:
    return f"{invoice.origin}/hpp/{invoice.session_id}"


def _processed(invoice: Invoice) -> Json:
    amount = invoice.processed_amount
    if amount is None:
        return dict.fromkeys(
            ("processed", "processed_amount", "processed_fee", "processed_deposit")
        )
    # processed_amount = processed_deposit + processed_fee (gateway.md §2.2).
    fee = invoice.payment_amount - invoice.amount if amount == invoice.payment_amount else Decimal()
    return {
        "processed": _seconds(invoice.processed_at),
        "processed_amount": wire.number(amount),
        "processed_fee": wire.number(fee),
        "processed_deposit": wire.number(amount - fee),
    }


def _payload(invoice: Invoice) -> Json | list[Any]:
    if not invoice.processed_at:
        return []
    return {
        "token": invoice.minted_token,
        "auth_type": "card",
        "client_ip": "203.0.113.10",
        "payment_card": _CARD,
    }


def _original_data(invoice: Invoice) -> Json | list[Any]:
    if invoice.is_open or invoice.status == "expired":
        return []
    return {"original_resolution": invoice.resolution, "original_resolution_message": None}


def _bank_numbers(invoice: Invoice) -> Json:
    if not invoice.processed_at:
        return {"rrn": None, "arn": None}
    return {"rrn": f"{invoice.number:08d}", "arn": f"{40_000_000 + invoice.number}"}


def _customer(invoice: Invoice) -> Json:
    customer = invoice.order.customer
    return {
        "type": "customers",
        "id": invoice.customer_id,
        "attributes": {
            "reference_id": customer.reference_id,
            "email": customer.email,
            "name": customer.name,
            "phone": customer.phone,
            "description": None,
            "created": int(invoice.created_at.timestamp()),
            "metadata": [],
            "avatar": "",
            "archived": False,
            "processing_options": {"payment_enabled": True, "payout_enabled": True},
            "address": [],
            "date_of_birth": None,
            "individual_tax_id": None,
            "passport_number": None,
            "passport_series": None,
            "first_name": None,
            "surname": None,
            "patronymic": None,
        },
        "relationships": {"commerce-account": _link("commerce-accounts", "coma_sandbox000000001")},
    }


def _asks_for_3ds(invoice: Invoice) -> bool:
    return invoice.outcome.answer is SaleAnswer.ASKS_FOR_3DS


def _auth_payload(invoice: Invoice) -> Json:
    return {"auth_payload": _AUTH_PAYLOAD} if _asks_for_3ds(invoice) else {}


def _seconds(instant: datetime | None) -> int | None:
    return None if instant is None else int(instant.timestamp())
