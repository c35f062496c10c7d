"""One POST to a receiver: no redirect, no proxy, 15 seconds in all, and a limited answer."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import PoolManager, Timeout

from billing_worker.clock import Clock, SystemClock
from billing_worker.gateway.deadline import POOLS_BY_SCHEME, within
from billing_worker.gateway.http import in_words, origin_of
from billing_worker.receivers.address import PUBLIC_POOLS, AddressRefusedError

DEADLINE_SECONDS: Final = 15.0
CONNECT_SECONDS: Final = 5.0
LONGEST_REPLY: Final = 64 * 1024
"""Bytes that are read of an answer. A longer answer closes the connection and is a failed try: it
is a page of a website rather than the word of a receiver.
"""

TOO_LONG: Final = "its answer is longer than 64 kB"

KEPT_HOSTS: Final = 100
KEPT_CONNECTIONS: Final = 32
"""Per host: more than one process sends to one endpoint at a time."""

USER_AGENT: Final = "billing-worker"

PRIVATE: Final = "refused: not a public address"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer. `status` None: there is none. `reason`: why this is no complete answer."""

    status: int | None
    reason: str | None = None
    retry_after: str | None = None  # the header as received


Post = Callable[[str, Mapping[str, str], bytes], Answer]
"""URL, headers, body. Never raises."""


class Poster:
    """Sends requests. Safe to share between threads and across a fork."""

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
        self._guard = threading.Lock()
        self._process: int | None = None
        self._manager: PoolManager

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
        answer = self._connections().urlopen(
            "POST",
            url,
            body=body,
            headers={**headers, "Accept-Encoding": "identity", "User-Agent": USER_AGENT},
            redirect=False,
            retries=False,
            timeout=Timeout(min(CONNECT_SECONDS, self._deadline), self._deadline),
            preload_content=False,
        )
        try:
            answer.read(LONGEST_REPLY, decode_content=False)
            is_whole = not answer.read(1, decode_content=False)
            if is_whole:  # the connection can be reused
                answer.release_conn()
        finally:
            answer.close()
        reason = None if is_whole else TOO_LONG
        return Answer(answer.status, reason, answer.headers.get("Retry-After"))

    def _connections(self) -> PoolManager:
        """Return this process's connections: a forked child must not write to its parent's
        sockets.
        """
        with self._guard:
            if self._process != os.getpid():
                self._process = os.getpid()
                self._manager = PoolManager(
                    num_pools=KEPT_HOSTS, maxsize=KEPT_CONNECTIONS, ssl_context=self._tls
                )
                self._manager.pool_classes_by_scheme = dict(self._pools)
            return self._manager
