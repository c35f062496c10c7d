"""The sandbox's record of a payment invoice."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Final

from billing_worker.sandbox.card_outcomes import Misstatement, Outcome
from billing_worker.sandbox.orders import Order

# The claim `exp` was created + 3600 in both samples that could be decoded (gateway.md §6).
BEARER_SECONDS: Final = 3600

_ONE_UNIT = Decimal(1)


@dataclass(slots=True, kw_only=True)
class Invoice:
    """One payment invoice. Only `Acquirer` changes its status and amounts.

    `reference_id` to `test_mode` are what the gateway *states*; a `wrong_*` token makes them differ
    from the order. Amounts are exact, in major units.
    """

    number: int
    gateway_id: str
    session_id: str
    order: Order
    outcome: Outcome
    origin: str
    """Scheme and host that the client has called: the start of the payment page's URL."""
    customer_id: str
    created_at: datetime

    reference_id: str
    amount: Decimal
    payment_amount: Decimal
    currency: str
    test_mode: bool

    bearer: str = field(repr=False)
    status: str = "process_pending"  # Already so before any sale (gateway.md §0 A).
    resolution: str = "ok"
    updated_at: datetime
    processed_at: datetime | None = None
    failed_at: datetime | None = None
    processed_amount: Decimal | None = None
    sales: int = 0
    """Number of sales that the gateway received."""
    minted_token: str | None = field(default=None, repr=False)

    @property
    def is_open(self) -> bool:
        return self.status == "process_pending"

    @property
    def ended_unpaid(self) -> bool:
        return self.status in {"process_failed", "expired"}


def open_invoice(
    number: int, order: Order, outcome: Outcome, *, origin: str, customer_id: str, now: datetime
) -> Invoice:
    session_id = f"cgi_{serial(number)}"
    invoice = Invoice(
        number=number,
        gateway_id=f"cpi_{serial(number)}",
        session_id=session_id,
        order=order,
        outcome=outcome,
        origin=origin,
        customer_id=customer_id,
        created_at=now,
        updated_at=now,
        reference_id=order.reference_id,
        amount=order.amount,
        payment_amount=order.amount,
        currency=order.currency,
        test_mode=order.test_mode,
        bearer=_bearer(session_id, now),
    )
    if outcome.misstates:
        _misstate(invoice, outcome.misstates)
    return invoice


def _misstate(invoice: Invoice, what: Misstatement) -> None:
    match what:
        case "amount":
            invoice.amount += _ONE_UNIT
            invoice.payment_amount = invoice.amount
        case "payment_amount":
            invoice.payment_amount += _ONE_UNIT
        case "currency":
            invoice.currency = "USD" if invoice.currency == "EUR" else "EUR"
        case "test_mode":
            invoice.test_mode = not invoice.test_mode
        case "reference_id":
            invoice.reference_id += "-other"


def serial(number: int) -> str:
    """Return a counter in the form of real ids, with 16 characters, and readable in a log."""
    return f"sandbox{number:09d}"


def bearer_expires(invoice: Invoice) -> int:
    """Return the UNIX second from which the cardgate refuses the bearer.

    A poll never renews it: the real behaviour is unknown (§6), so the worse case is assumed.
    """
    return int(invoice.created_at.timestamp()) + BEARER_SECONDS


def _bearer(session_id: str, now: datetime) -> str:
    claims = {"sid": session_id, "expires": None, "exp": int(now.timestamp()) + BEARER_SECONDS}
    return f"{_JWT_HEADER}.{_base64url(claims)}.c2FuZGJveA"


def _base64url(claims: Mapping[str, object]) -> str:
    text = json.dumps(claims, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


_JWT_HEADER: Final = _base64url({"typ": "JWT", "alg": "RS512"})
