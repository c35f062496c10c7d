"""One POST to a receiver: no redirect, no proxy, 15 seconds in all, and a short look at the answer."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from billing_worker.clock import Clock, SystemClock
from billing_worker.gateway.deadline import POOLS_BY_SCHEME, within
from billing_worker.gateway.http import in_words, origin_of
from billing_worker.receivers.address import PUBLIC_POOLS, AddressRefusedError

DEADLINE_SECONDS: Final = 15.0
CONNECT_SECONDS: Final = 5.0
LONGEST_REPLY: Final = 64 * 1024
"""Bytes that are read of an answer. The connection of a longer one is closed."""

PRIVATE: Final = "refused: not a public address"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `status` None: no whole answer, and `reason` says why."""

    status: int | None
    reason: str | None = None
    retry_after: str | None = None  # the header, as it came


Post = Callable[[str, Mapping[str, str], bytes], Answer]
"""URL, headers, body. Never raises."""


class Poster:
    """Safe to share between threads: each keeps its own connections."""

    def __init__(
        self,
        *,
        allow_private: bool,
        ca_bundle: str | None = None,
        deadline: float = DEADLINE_SECONDS,
        clock: Clock | None = None,
    ) -> None:
        self._pools = POOLS_BY_SCHEME if allow_private else PUBLIC_POOLS
        self._tls = ssl.create_default_context(cafile=ca_bundle or DEFAULT_CA_BUNDLE_PATH)
        self._deadline = deadline
        self._monotonic = (clock or SystemClock()).monotonic
        self._of_thread = threading.local()

    def __call__(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        limits = {"connect": self._deadline, "read_timeout": self._deadline}
        with within(self._deadline, monotonic=self._monotonic, **limits):
            try:
                return self._exchange(url, headers, body)
            except Exception as error:  # noqa: BLE001 - whatever it is, the event goes again
                if isinstance(origin_of(error), AddressRefusedError):
                    return Answer(None, PRIVATE)
                return Answer(None, in_words(error))

    def _exchange(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        answer = self._session().post(
            url,
            data=body,
            headers={**headers, "Accept-Encoding": "identity"},
            stream=True,
            allow_redirects=False,
            timeout=(min(CONNECT_SECONDS, self._deadline), self._deadline),
        )
        with closing(answer):
            _read_a_little(answer)
            return Answer(answer.status_code, retry_after=answer.headers.get("Retry-After"))

    def _session(self) -> requests.Session:
        """This thread's, and this process's: a forked child must not write to its parent's sockets."""
        mine = self._of_thread
        if getattr(mine, "process", None) != os.getpid():
            mine.process = os.getpid()
            mine.session = _new_session(self._pools, self._tls)
        session: requests.Session = mine.session
        return session


def _read_a_little(answer: requests.Response) -> None:
    """The end of an answer says nothing, but a connection serves again only once it is read."""
    answer.raw.read(LONGEST_REPLY, decode_content=False)


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Say that nothing redirects: requests would read the whole body of a 3xx."""
        return


class _Adapter(HTTPAdapter):
    def __init__(self, pools: Mapping[str, Any], tls: ssl.SSLContext) -> None:
        self._pools = dict(pools)
        self._tls = tls
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._tls)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def cert_verify(self, *_: Any) -> None:
        """Leave the certificates to the shared context, which has read them already."""


def _new_session(pools: Mapping[str, Any], tls: ssl.SSLContext) -> requests.Session:
    session = _Session()
    session.adapters.clear()
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter(pools, tls))
    session.trust_env = False  # A proxy of the environment would connect in our place.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session
