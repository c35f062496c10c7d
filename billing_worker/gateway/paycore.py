"""Adapter for the gateway of the page "Card Payments with Tokenisation": PayCore.io, Corefy and
their white labels.

§ numbers refer to `gateway.md` of the project's design papers.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

from billing_worker.clock import Clock
from billing_worker.domain.card_setup import PageStatement
from billing_worker.domain.errors import (
    GatewayError,
    InvalidInput,
    LookUpUnreliable,
    NotSent,
    OutcomeUnknown,
    Refused,
)
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import SaleAnswer, Statement
from billing_worker.gateway import answer_bodies, request_bodies
from billing_worker.gateway.http import Request, Response, Transport
from billing_worker.gateway.port import (
    CallLog,
    InstantOrder,
    Order,
    PageOrder,
    TokenisationOrder,
    WireCall,
)
from billing_worker.gateway.redaction import excerpt, legible, redact, redact_body, stated

T = TypeVar("T")

_HEADERS: Final = {"Accept": "application/json", "User-Agent": "billing-worker"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Addresses and credentials of the gateway. Raises InvalidInput for values that cannot work.

    `api_url` is used as given, with or without `/api`: white labels differ, and `links.self` does
    not show which form works (§0 M). If `test_mode` is given, an order of the other mode is never
    sent: a copy of the live database on a test machine must charge nobody.
    """

    api_url: str
    cardgate_url: str
    username: str
    password: Secret
    service_template: str = "payment_card_{currency}_hpp"
    test_mode: bool | None = None
    callback_url: str | None = None

    def __post_init__(self) -> None:
        _require_base_url("api_url", self.api_url)
        _require_base_url("cardgate_url", self.cardgate_url)
        if ":" in self.username:
            raise InvalidInput("username", "Basic authentication cannot carry a colon")

    def service(self, currency: str) -> str:
        """Return the gateway's code for card payments in a currency, as payment_card_usd_hpp."""
        return self.service_template.replace("{currency}", currency.lower())


# No credentials, query or fragment. The path may hold the prefix of a white label.
_BASE_URL: Final = re.compile(r"https?://[A-Za-z0-9._\[\]:-]+(?:/[A-Za-z0-9._~/-]*)?")


def _require_base_url(field: str, url: str) -> None:
    if not _BASE_URL.fullmatch(url):
        raise InvalidInput(field, "must be a plain http(s) URL without credentials or query")


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, the part of it that may be shown, and the secrets to hide in the answer."""

    operation: str
    request: Request
    secrets: tuple[Secret, ...]
    shown: dict[str, Any] | None = None
    moves_money: bool = False


class PaycoreGateway:
    """The `Gateway` port over HTTP. Safe to share between threads if the transport is.

    Some error trackers store the local variables of a traceback. So no function that an exception
    passes through holds a secret in a variable, except in a value whose `repr` hides it.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        settings: GatewaySettings,
        called: Callable[[WireCall], None] = lambda _: None,
    ) -> None:
        """`called` hears of every call; it must not raise."""
        self._called = called
        self._transport = transport
        self._clock = clock
        self._settings = settings
        self._api_url = settings.api_url.rstrip("/")
        self._sale_url = settings.cardgate_url.rstrip("/") + "/payment/sale"
        self._credential = _basic_credential(settings)

    def service(self, currency: str) -> str:
        return self._settings.service(currency)

    def create(self, order: InstantOrder, calls: CallLog) -> Statement:
        self._require_our_mode(order)
        call = self._create_call(order)
        return self._ask(call, calls, partial(_created, call, answer_bodies.created_invoice))

    def create_page(self, order: PageOrder, calls: CallLog) -> PageStatement:
        self._require_our_mode(order)
        call = self._create_call(order)
        read = partial(answer_bodies.invoice_with_page, just_created=True)
        return self._ask(call, calls, partial(_created, call, read))

    def find(self, reference_id: str, calls: CallLog) -> list[Statement]:
        query = f"?filter%5Breference_id%5D={quote(reference_id, safe='')}"
        read = partial(_found, reference_id)
        try:
            return self._ask(self._question("find", "/payment-invoices/" + query), calls, read)
        except OutcomeUnknown as unknown:
            if not _says_no_such_route(unknown):
                raise
        # Only one third party documents the slash before the query (§4).
        return self._ask(self._question("find", "/payment-invoices" + query), calls, read)

    def poll(self, gateway_id: str, calls: CallLog) -> Statement:
        if not answer_bodies.GATEWAY_ID.fullmatch(gateway_id):
            raise NotSent("the gateway id cannot be part of a path")
        call = self._question("look", f"/payment-invoices/{gateway_id}")
        return self._ask(call, calls, partial(_seen, gateway_id))

    def poll_page(self, gateway_id: str, calls: CallLog) -> PageStatement:
        if not answer_bodies.GATEWAY_ID.fullmatch(gateway_id):
            raise NotSent("the gateway id cannot be part of a path")
        call = self._question("look", f"/payment-invoices/{gateway_id}")
        return self._ask(call, calls, partial(_seen_page, gateway_id))

    def sale(self, bearer: Secret, calls: CallLog) -> SaleAnswer:
        if not answer_bodies.BEARER.fullmatch(bearer.reveal()):
            raise NotSent("the bearer cannot stand in a header")
        call = self._sale_call(bearer)
        return self._ask(call, calls, partial(_sold, call))

    # --- requests: URLs consist of configuration and checked ids only ---

    def _require_our_mode(self, order: Order) -> None:
        if self._settings.test_mode not in {None, order.test_mode}:
            raise NotSent("the order is for the other test mode")

    def _create_call(self, order: Order) -> _Call:
        service = self._settings.service(order.money.currency)
        body = request_bodies.create_request(
            order, service=service, callback_url=self._settings.callback_url
        )
        secrets = self._own_secrets()
        if not isinstance(order, TokenisationOrder):
            secrets = (order.card_token, *secrets)
        return _Call(
            "create",
            _post(f"{self._api_url}/payment-invoices", self._basic(), body),
            secrets,
            shown=redact_body(body, secrets),
        )

    def _sale_call(self, bearer: Secret) -> _Call:
        body = request_bodies.sale_request()
        return _Call(
            "sale",
            _post(self._sale_url, f"Bearer {bearer.reveal()}", body),
            (bearer, *self._own_secrets()),
            shown=body,
            moves_money=True,
        )

    def _question(self, operation: str, path: str) -> _Call:
        headers = {**_HEADERS, "Authorization": self._basic()}
        return _Call(operation, Request("GET", self._api_url + path, headers), self._own_secrets())

    def _basic(self) -> str:
        return f"Basic {self._credential.reveal()}"

    def _own_secrets(self) -> tuple[Secret, ...]:
        return self._settings.password, self._credential

    # --- the only place that sends requests ---

    def _ask(self, call: _Call, calls: CallLog, read: Callable[[Response], T]) -> T:
        """Send the request, always log the call, and return what `read` makes of the answer."""
        at, started = self._clock.now(), self._clock.monotonic()
        response = None
        outcome = "unknown: interrupted"
        try:
            response = self._transport.send(call.request, moves_money=call.moves_money)
            result = read(response)
            outcome = str(response.status)
        except GatewayError as error:
            outcome = _outcome(error)
            raise
        finally:
            seconds = self._clock.monotonic() - started
            made = _wire_call(call, at, seconds, outcome, response)
            calls.append(made)
            self._called(made)
        return result


def _basic_credential(settings: GatewaySettings) -> Secret:
    pair = f"{settings.username}:{settings.password.reveal()}"
    return Secret(base64.b64encode(pair.encode()).decode())


def _post(url: str, authorization: str, body: dict[str, Any]) -> Request:
    headers = {**_HEADERS, "Authorization": authorization, "Content-Type": "application/json"}
    return Request("POST", url, headers, request_bodies.encode(body))


# --- answers ---------------------------------------------------------------------------------


def _created(call: _Call, read: Callable[[bytes], T], response: Response) -> T:
    if _is_success(response):
        return _understood(read, response)
    raise _refusal(call, response)


def _found(reference_id: str, response: Response) -> list[Statement]:
    if not _is_success(response):
        raise _proves_nothing(response)
    try:
        return _understood(partial(answer_bodies.invoices_of, reference_id=reference_id), response)
    except answer_bodies.UnfilteredError as error:
        reason = str(error)
    raise LookUpUnreliable(reason, http_status=response.status)


def _seen(gateway_id: str, response: Response) -> Statement:
    # Not even a 404 proves "not charged": the prefix or the account may be wrong (§1.2).
    if not _is_success(response):
        raise _proves_nothing(response)
    statement = _understood(answer_bodies.invoice, response)
    _require_about(gateway_id, statement, response)
    return statement


def _seen_page(gateway_id: str, response: Response) -> PageStatement:
    if not _is_success(response):
        raise _proves_nothing(response)
    seen = _understood(answer_bodies.invoice_with_page, response)
    _require_about(gateway_id, seen.statement, response)
    return seen


def _require_about(gateway_id: str, statement: Statement, response: Response) -> None:
    if statement.gateway_id != gateway_id:
        raise OutcomeUnknown("answered about another invoice", http_status=response.status)


def _sold(call: _Call, response: Response) -> SaleAnswer:
    if _is_success(response):
        parse = partial(answer_bodies.sale_answer, http_status=response.status)
        return _understood(parse, response)
    raise _refusal(call, response)


def _is_success(response: Response) -> bool:
    return 200 <= response.status < 300  # noqa: PLR2004


def _understood(parse: Callable[[bytes], T], response: Response) -> T:
    try:
        return parse(response.body)
    except answer_bodies.UnreadableError as error:
        reason = str(error)
    # Raised outside of `except`, it has no context, whose local variables hold the parsed body.
    raise OutcomeUnknown(f"{response.status}, {reason}", http_status=response.status)


def _refusal(call: _Call, response: Response) -> Refused | OutcomeUnknown:
    """Return Refused for a 4xx with a reason in JSON. A web page may come from a proxy and proves
    nothing.
    """
    status = response.status
    title = answer_bodies.error_title(response.body)
    unknown = _proves_nothing(response)
    if not unknown.reads_like_a_refusal or title is None:
        return unknown
    return Refused(f"{status} {legible(redact(title, call.secrets))}", http_status=status)


def _proves_nothing(response: Response) -> OutcomeUnknown:
    return OutcomeUnknown(f"status {response.status}", http_status=response.status)


def _says_no_such_route(unknown: OutcomeUnknown) -> bool:
    status = unknown.http_status or 0
    return status in {404, 405} or 300 <= status < 400  # noqa: PLR2004


# --- the log -----------------------------------------------------------------------------------


def _outcome(error: GatewayError) -> str:
    kind = {NotSent: "not sent", Refused: "refused"}.get(type(error), "unknown")
    return f"{kind}: {error.reason}"


def _wire_call(
    call: _Call, at: datetime, seconds: float, outcome: str, response: Response | None
) -> WireCall:
    url = urlsplit(call.request.url)
    return WireCall(
        operation=call.operation,
        method=call.request.method,
        path=f"{url.path}?{url.query}" if url.query else url.path,
        at=at,
        duration_ms=round(seconds * 1000),
        outcome=outcome,
        request=call.shown,
        answer=_shown_of(call, response) if response else None,
    )


def _shown_of(call: _Call, response: Response) -> str:
    """Return the part of an answer that may be shown.

    A poll has no card token at hand to hide. So only the deciding fields of its answer are shown.
    """
    if call.shown is None:
        return stated(response.body, _DECIDING)
    return excerpt(response.body, call.secrets)


_DECIDING: Final = frozenset(
    {
        "id",
        "status",
        "resolution",
        "original_resolution",
        "reference_id",
        "amount",
        "payment_amount",
        "processed_amount",
        "currency",
        "test_mode",
        "moderation_required",
        "created",
        "updated",
        "processed",
    }
)
