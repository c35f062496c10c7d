"""JSON as a PHP gateway writes it, and the replies that a transport delivers to the client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from http import HTTPStatus
from typing import Any, Final

import simplejson


class Delivery(Enum):
    """How a reply is delivered. The request has taken effect in every case."""

    ANSWER = "answer"
    HANG_UP = "hang_up"  # The socket is closed before the first byte.
    NEVER = "never"  # The socket stays open, but no byte is sent.


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. Without a delivery, `status` is 0 and `body` empty, so that no test can read them.

    `delay_seconds` passes between the effect and the delivery.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    delivery: Delivery = Delivery.ANSWER
    delay_seconds: float = 0.0


_JSON: Final = {"Content-Type": "application/json"}

# Made once, so that a benchmark against the sandbox measures the client.
_ENCODER: Final = simplejson.JSONEncoder(use_decimal=True, separators=(",", ":"))
_DECODER: Final = json.JSONDecoder(parse_float=Decimal)


def answer(status: int, document: Mapping[str, Any]) -> Reply:
    return Reply(status, dump(document), _JSON)


def refusal(status: int, *details: str, headers: Mapping[str, str] | None = None) -> Reply:
    """Build the JSON:API error shape that most clients read (gateway.md §1.3)."""
    # Python 3.11 says "Unprocessable Entity", but a known client matches this title (§0 E).
    title = "Unprocessable Content" if status == 422 else HTTPStatus(status).phrase  # noqa: PLR2004
    errors = [{"title": title, "status": str(status), "detail": detail} for detail in details]
    return Reply(status, dump({"errors": errors}), {**_JSON, **(headers or {})})


def web_page(status: int, html: str) -> Reply:
    return Reply(status, html.encode(), {"Content-Type": "text/html; charset=utf-8"})


def lost(delivery: Delivery) -> Reply:
    return Reply(0, b"", delivery=delivery)


def dump(document: Mapping[str, Any]) -> bytes:
    r"""Serialise exact decimals as JSON numbers, with PHP's `\/` and `\uXXXX` escapes.

    The escapes are why a signature is checked on raw bytes (gateway.md §5).
    """
    text: str = _ENCODER.encode(document)
    return text.replace("/", "\\/").encode("ascii")


def load(body: bytes) -> Any:
    """Parse JSON with exact decimals. Raises ValueError for anything that is not JSON."""
    try:
        return _DECODER.decode(body.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def as_object(value: Any) -> dict[str, Any]:
    """Read a JSON object as PHP writes it: null and [] are empty objects (gateway.md §1.1)."""
    return value if isinstance(value, dict) else {}


def number(amount: Decimal) -> int | Decimal:
    """Write 10.00 as 10 and 9.90 as 9.9, like a PHP float: clients must compare values."""
    return int(amount) if amount == amount.to_integral_value() else amount.normalize()
