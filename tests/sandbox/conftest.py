"""A merchant that calls the sandbox without a socket, at a time that the test decides."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from billing_worker.sandbox.gateway import Behaviour, Reply, SandboxGateway

START = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
SALE = b'{"data":{"type":"sale-operation","attributes":{}}}'


class Clock:
    def __init__(self) -> None:
        self.time = START

    def now(self) -> datetime:
        return self.time

    def move(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@dataclass(frozen=True)
class Invoice:
    """What a create answered."""

    gateway_id: str
    bearer: str | None
    attributes: dict[str, Any]


class Merchant:
    """Speaks the wire format; shares nothing with the product's own client."""

    credentials = "Basic " + base64.b64encode(b"sandbox:sandbox").decode()

    def __init__(self, gateway: SandboxGateway, clock: Clock) -> None:
        self.gateway = gateway
        self.clock = clock

    def order(self, token: str | None = "approved", **changes: Any) -> dict[str, Any]:
        attributes = {
            "test_mode": True,
            "reference_id": "order-1",
            "currency": "USD",
            "amount": Decimal("9.99"),
            "service": "payment_card_usd_hpp",
            "token": token,
            "customer": {"reference_id": "customer-1"},
            "gateway_options": {"cardgate": {"instant": True}},
        }
        return {"data": {"type": "payment-invoices", "attributes": {**attributes, **changes}}}

    def post(self, document: Any) -> Reply:
        body = json.dumps(document, default=float).encode()
        return self.request("POST", "/api/payment-invoices", body)

    def request(self, method: str, target: str, body: bytes = b"") -> Reply:
        return self.gateway.handle(method, target, {"Authorization": self.credentials}, body)

    def create(self, token: str | None = "approved", **changes: Any) -> Invoice:
        reply = self.post(self.order(token, **changes))
        assert reply.status == 201, reply
        return self.invoice(reply)

    def invoice(self, reply: Reply) -> Invoice:
        data = json.loads(reply.body)["data"]
        bearer = data["attributes"]["flow_data"]["metadata"].get("token")
        return Invoice(data["id"], bearer, data["attributes"])

    def sell(self, invoice: Invoice) -> Reply:
        headers = {"Authorization": f"Bearer {invoice.bearer}"}
        return self.gateway.handle("POST", "/payment/sale", headers, SALE)

    def sold(self, token: str, **changes: Any) -> Invoice:
        invoice = self.create(token, **changes)
        self.sell(invoice)
        return invoice

    def look(self, invoice: Invoice) -> dict[str, Any]:
        """Return the attributes that a look-up shows."""
        reply = self.request("GET", f"/api/payment-invoices/{invoice.gateway_id}")
        assert reply.status == 200, reply
        return json.loads(reply.body)["data"]["attributes"]

    def status(self, invoice: Invoice) -> str:
        return self.look(invoice)["status"]

    def debits(self, reference_id: str = "order-1") -> list[Decimal]:
        return [debit.amount for debit in self.gateway.ledger.debits_for(reference_id)]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def merchant_of(clock):
    """Build a merchant of a gateway that behaves as told."""

    def build(**behaviour: Any) -> Merchant:
        return Merchant(SandboxGateway(Behaviour(**behaviour), clock.now), clock)

    return build


@pytest.fixture
def merchant(merchant_of):
    return merchant_of()


@pytest.fixture
def documented():
    """Read a body that a provider printed or sent (copied from the project's design papers)."""

    def read(name: str) -> Any:
        [path] = Path(__file__).parent.joinpath("documented").glob(f"{name}_*.json")
        return json.loads(path.read_text(encoding="utf-8"))

    return read
