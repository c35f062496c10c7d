"""Signed callbacks (gateway.md §5): each state change is posted to the invoice's callback URL."""

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
# How late a change that comes with time, and no request, may be told.
_TICK_SECONDS: Final = 0.1


def sign(body: bytes, secret: str) -> str:
    """Return the value of `X-Signature` for a raw body."""
    key = secret.encode()
    # SHA-1 is what the gateway prescribes.
    return base64.b64encode(hashlib.sha1(key + body + key).digest()).decode()  # noqa: S324


@dataclass(slots=True, order=True)
class _Letter:
    due: float  # Monotonic seconds.
    sequence: int
    url: str = field(compare=False)
    body: bytes = field(compare=False, repr=False)
    attempts: int = field(default=0, compare=False)


class CallbackSender:
    """Posts callbacks from one background thread for as long as the `with` block lasts.

    Anything but a 200 is a failure; the n-th retry comes n times `retry_seconds` after the attempt
    before it, until `attempts` are used up. A letter that waits for its retry holds up no other,
    so news can arrive out of order, as it does from the real gateway.
    """

    def __init__(
        self, gateway: SandboxGateway, *, retry_seconds: float = 60.0, attempts: int = 100
    ) -> None:
        self._gateway = gateway
        self._retry_seconds = retry_seconds
        self._attempts = attempts
        self._news: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._waiting: list[_Letter] = []
        self._written = 0
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
            # A proxy or a .netrc of this machine is none of the gateway's.
            session.trust_env = False
            while not self._stopping.is_set():
                self._gateway.advance()
                self._collect()
                self._post_what_is_due(session)

    def _collect(self) -> None:
        """Wait one tick for news at most, then take whatever there is."""
        try:
            news = self._news.get(timeout=_TICK_SECONDS)
            while True:
                self._written += 1
                heapq.heappush(self._waiting, _Letter(time.monotonic(), self._written, *news))
                news = self._news.get_nowait()
        except queue.Empty:
            pass

    def _post_what_is_due(self, session: requests.Session) -> None:
        while self._waiting and self._waiting[0].due <= time.monotonic():
            letter = heapq.heappop(self._waiting)
            letter.attempts += 1
            if not self._post(letter, session) and letter.attempts < self._attempts:
                letter.due = time.monotonic() + letter.attempts * self._retry_seconds
                heapq.heappush(self._waiting, letter)
            if self._stopping.is_set():
                return

    def _post(self, letter: _Letter, session: requests.Session) -> bool:
        signature = sign(letter.body, self._gateway.callback_secret)
        headers = {"Content-Type": "application/json", "X-Signature": signature}
        try:
            answer = session.post(
                letter.url,
                data=letter.body,
                headers=headers,
                timeout=_TIMEOUT_SECONDS,
                allow_redirects=False,
            )
        except requests.RequestException:
            return False
        return answer.status_code == HTTPStatus.OK
