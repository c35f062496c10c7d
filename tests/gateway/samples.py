"""Values that several tests of the gateway client start from."""

from __future__ import annotations

import base64
import copy
import functools
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from billing_worker.clock import SystemClock
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret
from billing_worker.gateway.http import Request, RequestsTransport, Response, Transport
from billing_worker.gateway.paycore import GatewaySettings, PaycoreGateway
from billing_worker.gateway.port import InstantOrder

TOKEN = "zsmmfyTkG6hn9DdwDhxh69LdQNJgZWk5xMdY7vg"
BEARER = "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzUxMiJ9.eyJzaWQiOiJjZ2lfMSJ9.c2lnbmF0dXJl"
PASSWORD = "s3cr/et key+of&the account"
BASIC = base64.b64encode(f"coma_1:{PASSWORD}".encode()).decode()
GATEWAY_ID = "cpi_ADzwZTG99f3q3utQ"

BODIES = Path(__file__).parent / "bodies"


def body(number: str) -> bytes:
    """The example body with this number, as it came over the wire."""
    (path,) = BODIES.glob(f"{number}_*.json")
    return path.read_bytes()


def invoice(**attributes: Any) -> dict[str, Any]:
    """The documented answer to a create (body 06), with some attributes changed."""
    resource: dict[str, Any] = json.loads(body("06"))
    resource["data"]["attributes"] |= attributes
    return resource


def listed(*invoices: dict[str, Any]) -> dict[str, Any]:
    return {"data": [copy.deepcopy(found["data"]) for found in invoices]}


def order(amount: str = "1", **changes: Any) -> InstantOrder:
    """The order behind the seed's request (body 05)."""
    values: dict[str, Any] = {
        "reference_id": "ORDER1233",
        "money": Money.parse(amount, "USD"),
        "test_mode": True,
        "card_token": Secret(TOKEN),
        "customer_reference_id": "my_customer_1",
    }
    return InstantOrder(**values | changes)


def settings(url: str, **changes: Any) -> GatewaySettings:
    values: dict[str, Any] = {
        "api_url": f"{url}/api",
        "cardgate_url": url,
        "username": "coma_1",
        "password": Secret(PASSWORD),
        "test_mode": True,
    }
    return GatewaySettings(**values | changes)


# Both are shared, because reading the certificates is most of the cost of a small test.
@functools.cache
def patient() -> RequestsTransport:
    """For answers that come: even on a busy machine they come within seconds."""
    return RequestsTransport(read_timeout=10)


@functools.cache
def impatient() -> RequestsTransport:
    """For answers that never come: waits 0.2 s in silence, and 0.4 s for a whole call."""
    return RequestsTransport(read_timeout=0.2, connect_timeout=0.2)


def paycore(url: str, transport: Transport | None = None, **changes: Any) -> PaycoreGateway:
    return PaycoreGateway(transport or patient(), SystemClock(), settings(url, **changes))


class Canned:
    """A transport that has its answer already; keeps what was sent."""

    def __init__(self, status: int, content: bytes) -> None:
        self.sent: list[Request] = []
        self._response = Response(status, content, "application/json")

    def send(self, request: Request, *, moves_money: bool) -> Response:
        self.sent.append(request)
        return self._response


def canned(status: int, content: bytes | dict[str, Any] | list[Any]) -> PaycoreGateway:
    """A gateway that gets this answer to whatever it asks, without any socket."""
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return paycore("http://gateway.example", Canned(status, encoded))


def exact(text: bytes) -> Any:
    """JSON with decimals kept exact, so that 9.99 is not compared as a float."""
    return json.loads(text, parse_float=Decimal)
