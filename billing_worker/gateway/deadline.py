"""A total deadline for one HTTP call, from name look-up to the last byte of the body.

The `timeout=` of requests limits each socket operation, so a server that sends one byte a second
keeps a call alive for ever. Here each wait for bytes ends at the deadline at the latest, in headers
and body, on plain sockets and on TLS.
"""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError


class DeadlineError(TimeoutError):
    """The total deadline has passed. urllib3 handles a TimeoutError like its own timeouts."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """`ends_at` and `connect_ends_at` are readings of `monotonic`. All values are in seconds."""

    ends_at: float
    connect_ends_at: float
    read_timeout: float
    monotonic: Callable[[], float]

    def remaining(self) -> float:
        return self.ends_at - self.monotonic()

    def next_wait(self) -> float:
        """Return for how many seconds the next read may block. Raises DeadlineError at zero."""
        remaining = self.remaining()
        if remaining <= 0:
            raise DeadlineError
        return min(self.read_timeout, remaining)


# requests makes the connections and cannot pass our deadline on to them. Without a deadline `get`
# raises LookupError: a connection of this module never waits without limit.
_current: ContextVar[Deadline] = ContextVar("deadline")


@contextmanager
def within(
    total: float, *, connect: float, read_timeout: float, monotonic: Callable[[], float]
) -> Iterator[Deadline]:
    """Limit everything that this thread reads inside the block to `total` seconds.

    A new connection must be made within `connect` seconds, or nothing is sent on it.
    """
    now = monotonic()
    deadline = Deadline(now + total, now + connect, read_timeout, monotonic)
    token = _current.set(deadline)
    try:
        yield deadline
    finally:
        _current.reset(token)


class _BoundedReader(io.RawIOBase):
    """Unbuffered bytes of a socket. The current deadline limits each wait for them."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        deadline = _current.get()
        self._sock.settimeout(deadline.next_wait())
        try:
            return self._raw.readinto(buffer)
        except TimeoutError:
            deadline.next_wait()  # Raises DeadlineError if the deadline was the cause.
            raise

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_BoundedReader(sock, self.fp.detach()))


class BoundedConnection(HTTPConnection):
    response_class = _BoundedResponse

    def connect(self) -> None:
        """Connect. Raises ConnectTimeoutError when the connection is made after the deadline.

        A name look-up and a list of dead addresses cannot be interrupted. The request is written
        after this method, so a call that is late here is certainly not sent.
        """
        super().connect()
        deadline = _current.get()
        if deadline.monotonic() >= deadline.connect_ends_at:
            raise ConnectTimeoutError(self, "connected after the deadline")


class BoundedTLSConnection(BoundedConnection, HTTPSConnection):
    """Makes the same check after the TLS handshake, which sends nothing of the request."""


class _BoundedPool(HTTPConnectionPool):
    ConnectionCls = BoundedConnection


class _BoundedTLSPool(HTTPSConnectionPool):
    ConnectionCls = BoundedTLSConnection


POOLS_BY_SCHEME: Final[dict[str, type[HTTPConnectionPool]]] = {
    "http": _BoundedPool,
    "https": _BoundedTLSPool,
}
"""For a urllib3 PoolManager, which then makes only connections with a deadline."""
