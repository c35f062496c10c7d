"""The sandbox as an HTTP/1.1 server with keep-alive and one thread per connection.

The stdlib's request handler parses headers with the e-mail package, which costs more CPU than the
whole sandbox. This server reads what a JSON API needs and refuses the rest.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from io import BufferedIOBase
from types import TracebackType
from typing import Final, Self

from billing_worker.sandbox import wire
from billing_worker.sandbox.gateway import SandboxGateway
from billing_worker.sandbox.wire import Delivery, Reply

_LARGEST_BODY: Final = 1024 * 1024
_LONGEST_LINE: Final = 16 * 1024
_MOST_HEADERS: Final = 100
# A client that is still sending would get a connection reset instead of the 413. So up to this
# many bytes are read first.
_LARGEST_DRAIN: Final = 16 * _LARGEST_BODY
_STOP_WITHIN_SECONDS: Final = 5.0


class SandboxServer:
    """Serves a gateway from its own thread while the `with` block lasts.

    `url` is known from the start of the block; with port 0 the system chooses a port.
    """

    def __init__(self, gateway: SandboxGateway, host: str = "127.0.0.1", port: int = 0) -> None:
        self._gateway = gateway
        self._address = (host, port)

    @property
    def url(self) -> str:
        host, port = self._listener.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._listener = _Listener(self._address, self._gateway)
        self._thread = threading.Thread(
            # A stop takes half a poll interval on average; the default interval is 0.5 s.
            target=lambda: self._listener.serve_forever(poll_interval=0.05),
            name="sandbox",
            daemon=True,
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()
        self._listener.drop_connections()


def serve(
    gateway: SandboxGateway,
    host: str,
    port: int,
    announce: Callable[[str], None] = lambda _url: None,
) -> None:
    """Serve until SIGINT or SIGTERM; `announce` is called with the URL. Needs the main thread."""
    stop = threading.Event()
    former = {
        number: signal.signal(number, lambda _number, _frame: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with SandboxServer(gateway, host, port) as server:
            announce(server.url)
            stop.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Listener(socketserver.ThreadingTCPServer):
    """Used in place of http.server's, which asks the DNS for its own name before it listens."""

    allow_reuse_address = True
    request_queue_size = 1024  # A benchmark opens hundreds of connections at once.

    def __init__(self, address: tuple[str, int], gateway: SandboxGateway) -> None:
        self.gateway = gateway
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__(address, _ConnectionHandler)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        # Every sale opens a new connection. threading.Thread waits until its thread has started,
        # which costs a third of the throughput with 16 clients. These threads are daemons too.
        _thread.start_new_thread(self.process_request_thread, (request, client_address))

    def joined(self, connection: socket.socket) -> None:
        with self._changed:
            self._connections.add(connection)

    def left(self, connection: socket.socket) -> None:
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    def drop_connections(self) -> None:
        """Shut all connections down and wait until their threads have ended."""
        self.stopping.set()
        with self._changed:
            for connection in self._connections:
                _shut(connection)
            self._changed.wait_for(lambda: not self._connections, _STOP_WITHIN_SECONDS)


class _ConnectionHandler(socketserver.StreamRequestHandler):
    """Handles the requests of one connection, one after another."""

    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.joined(self.connection)

    def finish(self) -> None:
        super().finish()
        self.server.left(self.connection)

    def handle(self) -> None:
        try:
            while not self.server.stopping.is_set() and self._answer_one():
                pass
        except (ConnectionError, TimeoutError):
            pass  # The client may close the connection at any time.

    def _answer_one(self) -> bool:
        """Answer one request. Return whether another may follow on this connection."""
        try:
            request = _read_request(self.rfile, self.connection)
        except _BadRequestError as error:
            self._send(wire.refusal(error.status, str(error)), keep_alive=False)
            return False
        if request is None:
            return False
        reply = self.server.gateway.handle(
            request.method, request.target, request.headers, request.body
        )
        return self._deliver(reply, keep_alive=request.keep_alive)

    def _deliver(self, reply: Reply, *, keep_alive: bool) -> bool:
        if reply.delay_seconds and self.server.stopping.wait(reply.delay_seconds):
            return False
        match reply.delivery:
            case Delivery.ANSWER:
                self._send(reply, keep_alive=keep_alive)
                return keep_alive
            case Delivery.HANG_UP:
                return False  # Ending the handler closes the connection.
            case Delivery.NEVER:
                self._stay_silent()
                return False

    def _send(self, reply: Reply, *, keep_alive: bool) -> None:
        """Send head and body in one packet: with two, the client would have to wait for both."""
        lines = [_status_line(reply.status)]
        lines += [f"{name}: {value}\r\n" for name, value in reply.headers.items()]
        lines.append(f"Content-Length: {len(reply.body)}\r\n")
        lines.append("\r\n" if keep_alive else "Connection: close\r\n\r\n")
        self.connection.sendall("".join(lines).encode("latin-1") + reply.body)

    def _stay_silent(self) -> None:
        """Keep the socket open without an answer until the client closes it or the server stops."""
        while self.rfile.read1(_LONGEST_LINE):
            pass


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    keep_alive: bool


class _BadRequestError(Exception):
    """The bytes are no supported request; the connection is closed after the answer."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def _read_request(stream: BufferedIOBase, connection: socket.socket) -> _Request | None:
    """Read one request; None if the client has closed the connection between two requests."""
    line = stream.readline(_LONGEST_LINE)
    if not line:
        return None
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004
        raise _BadRequestError(400, "the request line is not that of HTTP/1.x")
    method, target, version = words
    headers = _read_headers(stream)
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    return _Request(
        method,
        target,
        headers,
        _read_body(stream, headers),
        keep_alive=version == "HTTP/1.1" and headers.get("connection", "").lower() != "close",
    )


def _read_headers(stream: BufferedIOBase) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(_MOST_HEADERS):
        line = stream.readline(_LONGEST_LINE)
        if line in {b"\r\n", b"\n"}:
            return headers
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or not line.endswith(b"\n"):
            raise _BadRequestError(400, "a header line is malformed, too long or cut off")
        headers[name.lower()] = value.strip()
    raise _BadRequestError(431, f"at most {_MOST_HEADERS} headers are read")


def _read_body(stream: BufferedIOBase, headers: Mapping[str, str]) -> bytes:
    if "transfer-encoding" in headers:
        raise _BadRequestError(411, "bodies need a Content-Length")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise _BadRequestError(400, "Content-Length is not a number")
    size = int(length)
    if size > _LARGEST_BODY:
        _drain(stream, min(size, _LARGEST_DRAIN))
        raise _BadRequestError(413, f"a body has at most {_LARGEST_BODY} bytes")
    body = stream.read(size)
    if len(body) < size:
        raise ConnectionAbortedError
    return body


def _drain(stream: BufferedIOBase, size: int) -> None:
    while size > 0 and (chunk := stream.read(min(size, _LARGEST_BODY))):
        size -= len(chunk)


def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {_PHRASES[status]}\r\n"


_PHRASES: Final = {int(status): status.phrase for status in HTTPStatus}


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # The client may have closed it first.
        connection.shutdown(socket.SHUT_RDWR)
