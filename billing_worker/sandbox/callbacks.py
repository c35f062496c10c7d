"""Posts each state change of an invoice to its callback URL, signed (gateway.md §5)."""

from __future__ import annotations

import base64
import hashlib
import heapq
import queue
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self

import requests

from billing_worker.sandbox.gateway import SandboxGateway

# The documented timeouts of test mode: connect, read.
_TIMEOUT_SECONDS: Final = (10.0, 10.0)
# Longest delay until a change that no request has caused is noticed.
_TICK_SECONDS: Final = 0.1


def sign(body: bytes, secret: str) -> str:
    """Return the value of `X-Signature` for a raw body."""
    key = secret.encode()
    # The gateway prescribes SHA-1.
    return base64.b64encode(hashlib.sha1(key + body + key).digest()).decode()  # noqa: S324


@dataclass(slots=True, order=True)
class _Callback:
    due: float  # Monotonic seconds.
    sequence: int
    url: str = field(compare=False)
    body: bytes = field(compare=False, repr=False)
    attempts: int = field(default=0, compare=False)


class CallbackSender:
    """Posts callbacks from one background thread while the `with` block lasts.

    Any answer but 200 is a failure. The n-th retry follows n times `retry_seconds` after the post
    before it, until `attempts` are used up. A callback that waits for its retry delays no other, so
    callbacks can arrive out of order, as they do from the real gateway.
    """

    def __init__(
        self, gateway: SandboxGateway, *, retry_seconds: float = 60.0, attempts: int = 100
    ) -> None:
        self._gateway = gateway
        self._retry_seconds = retry_seconds
        self._attempts = attempts
        self._news: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._waiting: list[_Callback] = []
        self._sequence = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sandbox-callbacks", daemon=True)
        gateway.listen(lambda url, body: self._news.put((url, body)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with requests.Session() as session:
            # Ignore a proxy or a .netrc of this machine: the real gateway has neither.
            session.trust_env = False
            while not self._stopping.is_set():
                self._gateway.advance()
                self._collect()
                self._post_what_is_due(session)

    def _collect(self) -> None:
        """Wait up to one tick for a state change, then take all that have arrived."""
        try:
            news = self._news.get(timeout=_TICK_SECONDS)
            while True:
                self._sequence += 1
                heapq.heappush(self._waiting, _Callback(time.monotonic(), self._sequence, *news))
                news = self._news.get_nowait()
        except queue.Empty:
            pass

    def _post_what_is_due(self, session: requests.Session) -> None:
        while self._waiting and self._waiting[0].due <= time.monotonic():
            callback = heapq.heappop(self._waiting)
            callback.attempts += 1
            if not self._post(callback, session) and callback.attempts < self._attempts:
                callback.due = time.monotonic() + callback.attempts * self._retry_seconds
                heapq.heappush(self._waiting, callback)
            if self._stopping.is_set():
                return

    def _post(self, callback: _Callback, session: requests.Session) -> bool:
        signature = sign(callback.body, self._gateway.callback_secret)
        headers = {"Content-Type": "application/json", "X-Signature": signature}
        try:
            answer = session.post(
                callback.url,
                data=callback.body,
                headers=headers,
                timeout=_TIMEOUT_SECONDS,
                allow_redirects=False,
            )
        except requests.RequestException:
            return False
        return answer.status_code == HTTPStatus.OK
