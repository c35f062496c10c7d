"""The gateway port of the services. Only `sale` moves money; on a page the customer does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from billing_worker.domain.card_setup import PageStatement
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import SaleAnswer, Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What all orders for a gateway invoice have in common."""

    reference_id: str
    money: Money
    test_mode: bool
    customer_reference_id: str
    customer_name: str | None = None
    customer_email: str | None = None
    description: str | None = None
    book: str | None = None  # identity of our book; the gateway echoes it
    create: str | None = None  # name of this one request; the gateway echoes it too


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantOrder(_Order):
    """Order for an instant token invoice. The token appears only in the request body."""

    card_token: Secret = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisationOrder(_Order):
    """Order for a first payment on the gateway's page, after which the card has a token."""

    customer_phone: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the merchant's own; echoed
    return_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutOrder(_Order):
    """Order for a payment on the gateway's page with a card that is already filled in."""

    card_token: Secret = field(repr=False)
    return_url: str | None = None


PageOrder = TokenisationOrder | CheckoutOrder
Order = InstantOrder | PageOrder


@dataclass(frozen=True, slots=True)
class WireCall:
    """One call as a person may see it: no token, no bearer, no credentials."""

    operation: str  # create, find, look or sale
    method: str
    path: str
    at: datetime
    duration_ms: int
    outcome: str  # "201", "not sent: connection refused", "unknown: read timeout"
    request: dict[str, Any] | None = None
    answer: str | None = None  # at most 4,000 characters of the redacted body


CallLog = list[WireCall]
"""The gateway appends its calls. The caller stores them with its next commit."""


class Gateway(Protocol):
    """A failed call raises `NotSent`, `Refused` or `OutcomeUnknown`, and nothing else.

    Every call, failed or not, appends exactly one `WireCall` per sent request to `calls`.
    """

    def service(self, currency: str) -> str:
        """Return the code of the service that charges this currency. Sends no request."""
        ...

    def create(self, order: InstantOrder, calls: CallLog) -> Statement:
        """POST /payment-invoices. Moves no money."""
        ...

    def find(self, reference_id: str, calls: CallLog) -> list[Statement]:
        """GET /payment-invoices by our own reference. Returns exact matches, newest last.

        Statements from this list may lack fields and the bearer: `poll` before a decision.
        """
        ...

    def poll(self, gateway_id: str, calls: CallLog) -> Statement:
        """GET one invoice by its gateway id."""
        ...

    def create_page(self, order: PageOrder, calls: CallLog) -> PageStatement:
        """POST /payment-invoices for a payment on the gateway's page. Moves no money."""
        ...

    def poll_page(self, gateway_id: str, calls: CallLog) -> PageStatement:
        """GET one invoice, with its page, its customer and the card that paid it."""
        ...

    def sale(self, bearer: Secret, calls: CallLog) -> SaleAnswer:
        """POST /payment/sale. MOVES MONEY: on a new connection, never repeated."""
        ...
