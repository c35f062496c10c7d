"""One HTTP call, and what its result proves.

The result is `NotSent` when urllib3 proves that no byte of the request was sent, an answer when the
whole answer arrived, and `OutcomeUnknown` otherwise. `requests.ConnectionError` alone proves
nothing: it covers a refused connection and a server that read our POST and then hung up.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final, Protocol

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from billing_worker.clock import Clock, SystemClock
from billing_worker.domain.errors import GatewayError, NotSent, OutcomeUnknown
from billing_worker.gateway.deadline import POOLS_BY_SCHEME, DeadlineError, within

LONGEST_ANSWER: Final = 1024 * 1024
"""In bytes. The largest invoice seen has 5 KB; a list by reference holds a handful of them."""

_CHUNK: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """A request, byte for byte. Headers and body hold secrets, so `repr` leaves them out."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer of any status except 3xx. The body may hold a bearer: not in `repr`."""

    status: int
    body: bytes = field(repr=False)
    content_type: str = ""


class Transport(Protocol):
    def send(self, request: Request, *, moves_money: bool) -> Response:
        """Send exactly once, without a retry. Raises only NotSent or OutcomeUnknown."""
        ...


class RequestsTransport:
    """Transport on requests. Safe to share between threads and across a fork.

    All times are in seconds. `connect_timeout` limits the connection and TLS handshake to one
    address; for a sale it limits everything before the first byte, name look-up included.
    `read_timeout` limits each wait for the server. Their sum limits the whole call. `ca_bundle` is
    a PEM file to trust in place of Mozilla's list.
    """

    def __init__(
        self,
        *,
        read_timeout: float = 30.0,
        connect_timeout: float | None = None,
        ca_bundle: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._read_timeout = read_timeout
        self._connect_timeout = connect_timeout or min(5.0, read_timeout)
        self._monotonic = (clock or SystemClock()).monotonic
        # Reading the certificates takes 20 to 50 ms of CPU, which requests would spend again on
        # each fresh connection.
        self._tls = ssl.create_default_context(cafile=ca_bundle or DEFAULT_CA_BUNDLE_PATH)
        self._of_thread = threading.local()

    def send(self, request: Request, *, moves_money: bool) -> Response:
        # A failure is returned as a value and raised here. Raised where it happens, it would carry
        # the exception of requests as its context, and that holds the Authorization header.
        outcome = self._attempt(request, moves_money=moves_money)
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Close the calling thread's open connections. It may send further requests."""
        for session in getattr(self._of_thread, "sessions", {}).values():
            session.close()

    def _attempt(self, request: Request, *, moves_money: bool) -> Response | GatewayError:
        total = self._connect_timeout + self._read_timeout
        # A sale is sent within seconds of its commit, or not at all. The time counts a slow name
        # look-up and a list of dead addresses too, which no socket timeout limits.
        connect = self._connect_timeout if moves_money else total
        with within(
            total, connect=connect, read_timeout=self._read_timeout, monotonic=self._monotonic
        ):
            try:
                return self._exchange(request, moves_money=moves_money)
            except Exception as error:  # noqa: BLE001 - after any error the request may be sent.
                return _verdict(error)

    def _exchange(self, request: Request, *, moves_money: bool) -> Response | OutcomeUnknown:
        session = self._session(moves_money=moves_money)
        try:
            answer = session.send(
                _prepared(request, moves_money=moves_money),
                stream=True,
                allow_redirects=False,
                timeout=(self._connect_timeout, self._read_timeout),
            )
            with closing(answer):
                return _whole(answer)
        finally:
            # The gateway may close a kept connection just as the sale is sent, and then the outcome
            # is unknown. Closing the session drops its pools, so the next sale must connect.
            if moves_money:
                session.close()

    def _session(self, *, moves_money: bool) -> requests.Session:
        """This thread's session for one of the two kinds of call.

        A forked child must not write to the sockets of its parent, so it starts its own.
        """
        mine = self._of_thread
        if getattr(mine, "process", None) != os.getpid():
            mine.process = os.getpid()
            mine.sessions = {kind: _new_session(self._tls) for kind in (False, True)}
        session: requests.Session = mine.sessions[moves_money]
        return session


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Report no redirect.

        Even with allow_redirects=False, requests would read the whole body of a 3xx, however large,
        to prepare the next request.
        """
        return


class _Adapter(HTTPAdapter):
    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._tls)
        self.poolmanager.pool_classes_by_scheme = POOLS_BY_SCHEME

    def cert_verify(self, *_: Any) -> None:
        """Load no certificates: the shared context has loaded them.

        The pool still requires a valid one, because `verify=True` sets CERT_REQUIRED in its key.
        """


def _new_session(tls: ssl.SSLContext) -> requests.Session:
    session = _Session()
    session.adapters.clear()
    session.mount("https://", _Adapter(tls))
    session.mount("http://", _Adapter(tls))
    # The environment may name a proxy, and a .netrc would replace our Authorization header.
    session.trust_env = False
    # A cookie set for one customer's invoice must not travel with another's.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session


def _prepared(request: Request, *, moves_money: bool) -> requests.PreparedRequest:
    headers = {**request.headers, "Accept-Encoding": "identity"}
    if moves_money:
        headers["Connection"] = "close"
    prepared = requests.PreparedRequest()
    prepared.prepare(method=request.method, url=request.url, headers=headers, data=request.body)
    return prepared


def _whole(answer: requests.Response) -> Response | OutcomeUnknown:
    """Read the body and return the answer, or what is wrong with it."""
    status = answer.status_code
    if 300 <= status < 400:  # noqa: PLR2004
        return OutcomeUnknown(f"{status} redirect, not followed", http_status=status)
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        return OutcomeUnknown("compressed answer, not asked for", http_status=status)
    body = bytearray()
    for chunk in answer.raw.stream(_CHUNK, decode_content=False):
        body += chunk
        if len(body) > LONGEST_ANSWER:
            return OutcomeUnknown("answer too large", http_status=status)
    return Response(status, bytes(body), answer.headers.get("Content-Type", ""))


def _verdict(error: Exception) -> GatewayError:
    reason = _proof_of_not_sent(error)
    return NotSent(reason) if reason else OutcomeUnknown(in_words(error))


def _proof_of_not_sent(error: Exception) -> str | None:
    """Return why certainly no byte of the request was sent, or None when that is not certain."""
    retries = error.args[0] if isinstance(error, requests.ConnectionError) and error.args else None
    match retries.reason if isinstance(retries, urllib3.exceptions.MaxRetryError) else None:
        case urllib3.exceptions.NameResolutionError():
            return "name look-up failed"
        case urllib3.exceptions.NewConnectionError():
            return "no connection"
        case urllib3.exceptions.ConnectTimeoutError():
            return "connect timeout"
        case _:
            return None


# Subclasses stand before their base classes.
_WORDS: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (DeadlineError, "total deadline passed"),
    (TimeoutError, "timeout"),
    (ssl.SSLError, "TLS failure"),
    (http.client.RemoteDisconnected, "hung up without an answer"),
    (http.client.IncompleteRead, "answer cut short"),
    (http.client.HTTPException, "not HTTP"),
    (ConnectionError, "connection lost"),
)


def in_words(error: Exception) -> str:
    """Describe the error without its message: messages quote addresses and bytes of the answer."""
    origin = origin_of(error)
    words = next((words for kind, words in _WORDS if isinstance(origin, kind)), "call failed")
    return f"{words} ({type(origin).__name__})"


def origin_of(error: BaseException) -> BaseException:
    """Return the first exception in the chain that is no wrapper of requests or urllib3."""
    chain = list(_chain(error))
    return next((link for link in chain if not isinstance(link, _WRAPPERS)), chain[-1])


_WRAPPERS: Final = (requests.RequestException, urllib3.exceptions.HTTPError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
