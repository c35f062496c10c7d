"""A gateway to practise on: it answers in the documented wire format, without a socket.

It shares no code with the rest of the package on purpose: shared code would hide the bugs of client
and gateway. The same calls at the same times give the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import parse_qs

from billing_worker.sandbox import documents, wire
from billing_worker.sandbox.behaviour import Behaviour, SecondSale
from billing_worker.sandbox.card_outcomes import OUTCOMES, Creation, Outcome, SaleAnswer, outcome_of
from billing_worker.sandbox.invoices import Invoice, bearer_expires
from billing_worker.sandbox.ledger import Ledger, Requests
from billing_worker.sandbox.orders import Order, OrderError, read_order
from billing_worker.sandbox.state import Books
from billing_worker.sandbox.wire import Delivery, Reply

__all__ = ["Behaviour", "Delivery", "Listener", "Reply", "SandboxGateway"]

Listener = Callable[[str, bytes], None]
"""Called with (URL, raw body) on every state change of an invoice that has a callback URL.

The gateway holds its lock during the call, so a listener must return at once.
"""

_LONGEST_LIST: Final = 100
_PAGE: Final = 20
_HOST_OF_NOBODY: Final = "sandbox.invalid"


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # Names in lower case.
    body: bytes
    now: datetime


class SandboxGateway:
    """The practice gateway. It is thread-safe and handles one request at a time.

    `now` returns aware datetimes. Basic auth of the private API is `username:password`; callbacks
    are signed with `callback_secret`. Invoices are numbered from `first_number`: after a restart
    beside a lasting database, no id may be used a second time.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        now: Callable[[], datetime],
        *,
        username: str = "sandbox",
        password: str = "sandbox",  # noqa: S107 - printed on start-up: it protects nothing.
        callback_secret: str = "sandbox-secret",  # noqa: S107
        first_number: int = 1,
    ) -> None:
        self._first_number = first_number
        self.username = username
        self.password = password
        self.callback_secret = callback_secret
        self._basic = base64.b64encode(f"{username}:{password}".encode()).decode()
        self._now = now
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._first_behaviour = behaviour
        self._books = Books(behaviour, self._announce, first_number)

    def handle(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Answer one HTTP request; `target` is path and query as in the request line.

        The request has taken effect when this returns, whatever the reply's `delivery` is.
        """
        path, _, query = target.partition("?")
        lowered = {name.lower(): value for name, value in headers.items()}
        with self._lock:
            request = _Request(
                method, path.removeprefix("/api"), query, lowered, body, self._advance()
            )
            return self._route(request)

    @property
    def ledger(self) -> Ledger:
        """All debits up to now."""
        with self._lock:
            self._advance()
            return self._books.ledger

    def metadata_of(self, gateway_id: str) -> Mapping[str, Any]:
        """Return the metadata that the create of an invoice sent."""
        invoice = self._books.with_id(gateway_id)
        return invoice.order.metadata if invoice else {}

    @property
    def requests(self) -> Requests:
        return self._books.requests

    @property
    def behaviour(self) -> Behaviour:
        return self._books.acquirer.behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        with self._lock:
            self._books.acquirer.behaviour = behaviour

    def pay_on_page(self, gateway_id: str) -> Reply:
        """Pay on the hosted page as the customer. Replies 200 with the invoice, 404 or 409.

        The payment always succeeds; the token's script does not apply. A tokenising invoice gets a
        new token in its payload.
        """
        with self._lock:
            return self._pay(gateway_id, self._advance())

    def reset(self) -> None:
        """Delete all data and restore the first behaviour. Listeners stay."""
        with self._lock:
            self._books = Books(self._first_behaviour, self._announce, self._first_number)

    def listen(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.append(listener)

    def advance(self) -> None:
        """Carry out all due events now. Otherwise listeners learn of them with the next request."""
        with self._lock:
            self._advance()

    def _advance(self) -> datetime:
        now = self._now()
        self._books.acquirer.advance(now)
        return now

    def _announce(self, invoice: Invoice) -> None:
        url = invoice.order.callback_url
        if url and self._listeners:
            body = wire.dump(documents.looked_up(invoice))
            for listener in self._listeners:
                listener(url, body)

    def _route(self, request: _Request) -> Reply:
        match request.path.strip("/").split("/"):
            case ["payment-invoices", *rest]:
                return self._late(self._private_api(request, rest))
            case ["payment", "sale"] if request.method == "POST":
                return self._late(self._sale(request))
            case ["hpp", session_id] if request.method == "GET":
                return self._show_page(session_id)
            case ["_sandbox", *rest]:
                return self._control(request, rest)
        return _NOT_FOUND

    def _late(self, reply: Reply) -> Reply:
        latency = self.behaviour.latency_seconds
        if not latency:
            return reply
        return dataclasses.replace(reply, delay_seconds=reply.delay_seconds + latency)

    def _private_api(self, request: _Request, rest: list[str]) -> Reply:
        if _credentials(request, "basic") != self._basic:
            return _UNAUTHORISED
        match request.method, rest:
            case "POST", []:
                return self._create(request)
            case "GET", []:
                return self._find(request)
            case "GET", [gateway_id]:
                return self._look(gateway_id)
        return _NOT_FOUND

    def _create(self, request: _Request) -> Reply:
        try:
            document = wire.load(request.body)
        except ValueError:
            return _NOT_JSON
        self._books.requests.count("create", _named_reference(document))
        try:
            order = read_order(document)
        except OrderError as error:
            return self._refused(422, *error.faults)
        outcome = self._outcome(order)
        if outcome is None or outcome.creation is Creation.TOKEN_REJECTED:
            return self._refused(422, "token is unknown for this customer")
        return self._accept(order, outcome, request)

    def _outcome(self, order: Order) -> Outcome | None:
        if order.token is None:
            return OUTCOMES["approved"]
        if not self._books.may_use(order.token, order.customer.reference_id):
            return None
        return outcome_of(order.token)

    def _accept(self, order: Order, outcome: Outcome, request: _Request) -> Reply:
        existing = self._books.with_reference(order.reference_id)
        if existing and self.behaviour.duplicate_create != "accept_new":
            return self._duplicate(existing[-1])
        first = self._books.is_first_try(order.reference_id)
        if first and outcome.creation is Creation.ERROR_500:
            return _SERVER_ERROR
        host = request.headers.get("host", _HOST_OF_NOBODY)
        invoice = self._books.open(order, outcome, origin=f"http://{host}", now=request.now)
        if first and outcome.creation is Creation.ANSWER_LOST:
            return wire.lost(Delivery.HANG_UP)
        return wire.answer(201, documents.created(invoice))

    def _duplicate(self, existing: Invoice) -> Reply:
        policy = self.behaviour.duplicate_create
        if policy == "return_existing":
            return wire.answer(200, documents.created(existing))
        return self._refused(int(policy), "duplicate request detected: reference_id is taken")

    def _refused(self, status: int, *faults: str) -> Reply:
        match self.behaviour.refusal_shape:
            case "jsonapi":
                return wire.refusal(status, *faults)
            case "error":
                return wire.answer(status, {"error": {"message": "; ".join(faults)}})
            case "errors_by_field":
                errors = {"data.attributes": list(faults)}
                return wire.answer(status, {"message": "invalid data", "errors": errors})
            case "code":
                return wire.answer(status, {"code": status, "message": "; ".join(faults)})
            case "html":
                return wire.web_page(status, f"<html><h1>{status}</h1></html>")

    def _find(self, request: _Request) -> Reply:
        wanted = parse_qs(request.query).get("filter[reference_id]")
        self._books.requests.count("find", wanted[-1] if wanted else None)
        if wanted is None:
            return wire.answer(200, documents.listed(self._books.latest(_LONGEST_LIST)))
        match self.behaviour.list_filter:
            case "exact":
                found = self._books.with_reference(wanted[-1])
            case "expression":
                found = self._books.matching(wanted[-1])
            case "ignored":
                return self._first_page()
        return wire.answer(200, documents.listed(found))

    def _first_page(self) -> Reply:
        """Return the newest invoices, newest first, with a link to the next page."""
        newest = self._books.latest(_PAGE + 1)[::-1]
        document = documents.listed(newest[:_PAGE])
        if len(newest) > _PAGE:
            document["links"] = {"next": "/api/payment-invoices?page[number]=2"}
        return wire.answer(200, document)

    def _look(self, gateway_id: str) -> Reply:
        invoice = self._books.with_id(gateway_id)
        self._books.requests.count("look", invoice.order.reference_id if invoice else None)
        if invoice is None:
            return _NOT_FOUND
        return wire.answer(200, documents.looked_up(invoice))

    def _sale(self, request: _Request) -> Reply:
        invoice = self._books.with_bearer(_credentials(request, "bearer"))
        self._books.requests.count("sale", invoice.order.reference_id if invoice else None)
        if invoice is None or self._bearer_is_stale(invoice, request.now):
            return _UNAUTHORISED
        if not _is_sale_operation(request.body):
            return wire.refusal(422, "data must be a sale-operation with an object of attributes")
        match self._policy(invoice):
            case "refuse":
                return wire.refusal(422, f"the invoice cannot be sold: it is {invoice.status}")
            case "ignore":
                return self._sale_status(invoice)
            case "charge":
                self._books.acquirer.sell(invoice, request.now)
                return self._sale_answer(invoice)

    def _bearer_is_stale(self, invoice: Invoice, now: datetime) -> bool:
        # Without this exception, the expired bearer would hide the effect of `sale_on_final`.
        if self.behaviour.sale_on_final == "charge":
            return False
        return now.timestamp() >= bearer_expires(invoice)

    def _policy(self, invoice: Invoice) -> SecondSale:
        if invoice.ended_unpaid and self.behaviour.sale_on_final == "charge":
            return "charge"
        if invoice.ended_unpaid:
            repeated = invoice.sales and self.behaviour.second_sale == "ignore"
            return "ignore" if repeated else "refuse"
        return self.behaviour.second_sale if invoice.sales else "charge"

    def _sale_answer(self, invoice: Invoice) -> Reply:
        match invoice.outcome.answer:
            case SaleAnswer.SILENCE:
                return wire.lost(Delivery.NEVER)
            case SaleAnswer.HANG_UP:
                return wire.lost(Delivery.HANG_UP)
            case SaleAnswer.ERROR_500:
                return _SERVER_ERROR
            case SaleAnswer.HTML_502:
                return wire.web_page(502, "<html><h1>502 Bad Gateway</h1></html>")
            case SaleAnswer.STATUS | SaleAnswer.ASKS_FOR_3DS:
                return self._sale_status(invoice)

    def _sale_status(self, invoice: Invoice) -> Reply:
        if self.behaviour.sale_shape == "nested":
            document = documents.sold_nested(invoice)
        else:
            document = documents.sold_flat(invoice)
        # 201 is documented for the 3-D Secure flow, 200 is plausible elsewhere (§6).
        status = 201 if invoice.outcome.answer is SaleAnswer.ASKS_FOR_3DS else 200
        delay = self.behaviour.slow_seconds if invoice.outcome.slow else 0.0
        return dataclasses.replace(wire.answer(status, document), delay_seconds=delay)

    def _show_page(self, session_id: str) -> Reply:
        invoice = self._books.with_session(session_id)
        if invoice is None or invoice.order.instant:
            return _NOT_FOUND
        return wire.web_page(200, documents.payment_page(invoice))

    def _pay(self, gateway_id: str, now: datetime) -> Reply:
        invoice = self._books.with_id(gateway_id)
        if invoice is None:
            return _NOT_FOUND
        if invoice.order.instant or not invoice.is_open:
            return wire.refusal(409, "only an open invoice with a page can be paid by hand")
        if invoice.order.tokenize:
            self._books.mint_token(invoice)
        self._books.acquirer.charge(invoice, now)
        return wire.answer(200, documents.looked_up(invoice))

    def _control(self, request: _Request, rest: list[str]) -> Reply:
        """Serve the sandbox's own endpoints, which need no auth and have no latency."""
        match request.method, rest:
            case "GET", ["ledger"]:
                return wire.answer(200, self._books.ledger.as_json())
            case "GET", ["requests"]:
                return wire.answer(200, self._books.requests.as_json())
            case "POST", ["behaviour"]:
                return self._change_behaviour(request.body)
            case "POST", ["reset"]:
                self._books = Books(self._first_behaviour, self._announce, self._first_number)
                return wire.answer(200, self.behaviour.as_json())
            case "POST", ["pay", gateway_id]:
                return self._pay(gateway_id, request.now)
        return _NOT_FOUND

    def _change_behaviour(self, body: bytes) -> Reply:
        try:
            changes = wire.as_object(wire.load(body))
            self._books.acquirer.behaviour = self.behaviour.changed(changes)
        except ValueError as error:
            return wire.refusal(422, str(error))
        return wire.answer(200, self.behaviour.as_json())


def _credentials(request: _Request, scheme: str) -> str:
    given, _, credentials = request.headers.get("authorization", "").partition(" ")
    return credentials if given.lower() == scheme else ""


def _named_reference(document: Any) -> str | None:
    """Read the reference of an order that may break every other rule."""
    data = wire.as_object(wire.as_object(document).get("data"))
    reference = wire.as_object(data.get("attributes")).get("reference_id")
    return reference if isinstance(reference, str) else None


def _is_sale_operation(body: bytes) -> bool:
    """Whether `attributes` is an object and not PHP's [] (the documented request of §6)."""
    try:
        data = wire.as_object(wire.as_object(wire.load(body)).get("data"))
    except ValueError:
        return False
    return data.get("type") == "sale-operation" and isinstance(data.get("attributes"), dict)


_NOT_JSON: Final = wire.refusal(400, "the body is not JSON")
_UNAUTHORISED: Final = wire.refusal(
    401, "unknown or expired credentials", headers={"WWW-Authenticate": 'Basic realm="sandbox"'}
)
_NOT_FOUND: Final = wire.refusal(404, "nothing is here")
_SERVER_ERROR: Final = wire.refusal(500, "something went wrong")
