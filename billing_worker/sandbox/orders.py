"""Reads `POST /payment-invoices` as strictly as the documents are (gateway.md §2.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from billing_worker.sandbox import wire

_NUMERIC: Final = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)
# No currency has more than four decimals.
_FINEST_STEP: Final = Decimal("0.0001")
_LARGEST_AMOUNT: Final = Decimal(1_000_000_000)
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_MOST_METADATA_KEYS: Final = 20


class OrderError(Exception):
    """The order breaks rules; `faults` has one sentence for each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Customer:
    reference_id: str
    name: str | None
    email: str | None
    phone: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A valid create request. The amount is exact, in major units."""

    reference_id: str
    amount: Decimal
    currency: str
    service: str
    test_mode: bool
    customer: Customer
    token: str | None = field(repr=False)
    instant: bool
    tokenize: bool
    description: str | None
    metadata: Mapping[str, Any]
    callback_url: str | None
    return_url: str | None
    return_urls: Mapping[str, Any]


def read_order(document: Any) -> Order:
    """Read a parsed body. Raises OrderError with all faults at once."""
    data = wire.as_object(wire.as_object(document).get("data"))
    form = _Form(wire.as_object(data.get("attributes")))
    if data.get("type") != "payment-invoices":
        form.fault("data.type must be payment-invoices")
    order = _read(form)
    if form.faults:
        raise OrderError(form.faults)
    return order


def _read(form: _Form) -> Order:
    cardgate = form.section("gateway_options").section("cardgate")
    customer = form.section("customer")
    currency = form.currency()
    order = Order(
        reference_id=form.required("reference_id"),
        amount=form.amount(),
        currency=currency,
        service=form.service(currency),
        test_mode=form.flag("test_mode"),
        customer=Customer(
            reference_id=customer.required("reference_id"),
            name=customer.text("name"),
            email=customer.text("email"),
            phone=customer.text("phone"),
        ),
        token=form.text("token"),
        instant=cardgate.flag("instant"),
        tokenize=cardgate.flag("tokenize"),
        description=form.text("description"),
        metadata=form.metadata(),
        # The second example of the gateway's page has it outside `attributes`: a mistake (§2.1).
        callback_url=form.url("callback_url"),
        return_url=form.text("return_url"),
        return_urls=form.section("return_urls").fields,
    )
    if order.instant and order.token is None:
        form.fault("token is required with gateway_options.cardgate.instant")
    return order


class _Form:
    """Reads the fields of one JSON object and collects all faults, so that one answer has them."""

    def __init__(
        self, fields: dict[str, Any], path: str = "", faults: list[str] | None = None
    ) -> None:
        self.fields = fields
        self.faults: list[str] = [] if faults is None else faults
        self._path = path

    def fault(self, sentence: str) -> None:
        self.faults.append(sentence)

    def section(self, name: str) -> _Form:
        fields = wire.as_object(self.fields.get(name))
        return _Form(fields, f"{self._path}{name}.", self.faults)

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is None or (isinstance(value, str) and value):
            return value
        self.fault(f"{self._path}{name} must be a string with something in it")
        return None

    def required(self, name: str) -> str:
        if self.fields.get(name) is None:
            self.fault(f"{self._path}{name} is required")
        return self.text(name) or ""

    def url(self, name: str) -> str | None:
        url = self.text(name)
        if url and not url.startswith(("https://", "http://")):
            self.fault(f"{self._path}{name} must be a URL")
        return url

    def flag(self, name: str) -> bool:
        value = self.fields.get(name, False)
        if not isinstance(value, bool):
            self.fault(f"{self._path}{name} must be true or false")
        return value is True

    def amount(self) -> Decimal:
        value = self.fields.get("amount")
        amount = _exact(value)
        if value is None:
            self.fault("amount is required")
        elif amount is None:
            self.fault("amount must be a number in major units")
        elif not 0 < amount <= _LARGEST_AMOUNT:
            self.fault(f"amount must be above 0 and at most {_LARGEST_AMOUNT}")
        elif amount != amount.quantize(_FINEST_STEP):
            self.fault("amount has at most 4 decimals")
        return amount or Decimal(0)

    def currency(self) -> str:
        currency = self.required("currency")
        if currency and not _CURRENCY.fullmatch(currency):
            self.fault("currency must be three capital letters")
        return currency

    def service(self, currency: str) -> str:
        service = self.required("service")
        expected = f"payment_card_{currency.lower()}_hpp"
        if service and currency and service != expected:
            self.fault(f"service must be {expected}")
        return service

    def metadata(self) -> dict[str, Any]:
        metadata = self.section("metadata").fields
        if len(metadata) > _MOST_METADATA_KEYS:
            self.fault(f"metadata has at most {_MOST_METADATA_KEYS} keys")
        return metadata


def _exact(value: Any) -> Decimal | None:
    """Read a JSON number, or a numeric string: one official sample sends "100" (§2.1)."""
    if isinstance(value, Decimal):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    if isinstance(value, str) and _NUMERIC.fullmatch(value):
        return Decimal(value)
    return None
