"""A total deadline for one HTTP call: name look-up to last byte of the body.

The `timeout=` of requests bounds every single socket operation, so a server that drips one byte
a second keeps a call alive for as long as it likes. Here each wait for bytes is cut short by what
is left until the deadline, in headers and body alike, on plain sockets and on TLS.
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
    """A TimeoutError, so that urllib3 treats it as one of its own."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """`ends_at` and `connect_ends_at` are on the scale of `monotonic`: seconds, as is
    `read_timeout`.
    """

    ends_at: float
    connect_ends_at: float
    read_timeout: float
    monotonic: Callable[[], float]

    def remaining(self) -> float:
        return self.ends_at - self.monotonic()

    def next_wait(self) -> float:
        """Seconds the next read may block. Raises DeadlineError when none are left."""
        remaining = self.remaining()
        if remaining <= 0:
            raise DeadlineError
        return min(self.read_timeout, remaining)


# Connections are made deep inside requests, which passes nothing of ours on to them. Without a
# deadline `get` raises LookupError: a connection of this module never waits without limit.
_current: ContextVar[Deadline] = ContextVar("deadline")


@contextmanager
def within(
    total: float, *, connect: float, read_timeout: float, monotonic: Callable[[], float]
) -> Iterator[Deadline]:
    """Bound everything that this thread reads inside the block to `total` seconds, of which
    `connect` until a new connection stands. Later nothing is sent on it.
    """
    now = monotonic()
    deadline = Deadline(now + total, now + connect, read_timeout, monotonic)
    token = _current.set(deadline)
    try:
        yield deadline
    finally:
        _current.reset(token)


class _BoundedReader(io.RawIOBase):
    """The unbuffered bytes of a socket, each wait for them bounded by the current deadline."""

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
            deadline.next_wait()  # Raises the error that says so when it was the deadline.
            raise

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_BoundedReader(sock, self.fp.detach()))


class _BoundedConnection(HTTPConnection):
    response_class = _BoundedResponse

    def connect(self) -> None:
        """Connect, or raise ConnectTimeoutError when that took until after the deadline.

        The operating system's name look-up and a list of dead addresses cannot be interrupted.
        The request is written after this method, so a call that is late here is certainly not
        sent.
        """
        super().connect()
        deadline = _current.get()
        if deadline.monotonic() >= deadline.connect_ends_at:
            raise ConnectTimeoutError(self, "connected after the deadline")


class _BoundedTLSConnection(_BoundedConnection, HTTPSConnection):
    """The check above runs after the TLS handshake, which has sent nothing of the request."""


class _BoundedPool(HTTPConnectionPool):
    ConnectionCls = _BoundedConnection


class _BoundedTLSPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedTLSConnection


POOLS_BY_SCHEME: Final[dict[str, type[HTTPConnectionPool]]] = {
    "http": _BoundedPool,
    "https": _BoundedTLSPool,
}
"""For a urllib3 PoolManager: it then makes bounded connections only."""
