"""A TCP server whose next moves are written down before the call: how a gateway can misbehave.

    with WireServer([answer(201, body), hang_up_after_reading]) as server:
        ...
    assert server.count("/payment/sale") == 1

One act per request, the last one for ever. An act gets the `Stage`: the connection and the
request that was read from it. It returns whether the connection stays open.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Received:
    """One request as it arrived; `connection` counts the accepted connections from 1."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Stage:
    sock: socket.socket
    request: Received | None
    closing: threading.Event = field(repr=False)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def drip(self, data: bytes, every: float) -> None:
        """One byte at a time, until all are out or the client has gone."""
        for byte in data:
            if self.closing.wait(every):
                return
            self.send(bytes([byte]))


Act = Callable[[Stage], bool | None]


class WireServer:
    def __init__(self, acts: list[Act], *, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self._acts = acts
        self._tls = tls
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._turn = threading.Lock()

    @property
    def url(self) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    def count(self, path: str) -> int:
        return sum(1 for request in self.requests if request.target.partition("?")[0] == path)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        # Closing alone does not wake a thread that waits in accept.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(
                target=self._serve, args=(sock, self.connections), daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, connection: int) -> None:
        with contextlib.suppress(OSError), contextlib.closing(sock):
            sock.settimeout(10)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with contextlib.closing(sock):
                while self._play(sock, connection):
                    pass

    def _play(self, sock: socket.socket, connection: int) -> bool:
        if self._next_act() in BEFORE_READING:
            return bool(self._take_act()(Stage(sock, None, self._closing)))
        request = _read(sock, connection, self._closing)
        if request is None:
            return False
        with self._turn:
            self.requests.append(request)
            act = self._take_act()
        return bool(act(Stage(sock, request, self._closing)))

    def _next_act(self) -> Act:
        return self._acts[0]

    def _take_act(self) -> Act:
        return self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]


def _read(sock: socket.socket, connection: int, closing: threading.Event) -> Received | None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += (piece := _some(sock, closing))
        if not piece:
            return None
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += (piece := _some(sock, closing))
        if not piece:
            return None
    method, target, _ = first.split(" ")
    return Received(method, target, headers, body, connection)


def _some(sock: socket.socket, closing: threading.Event) -> bytes:
    """The next bytes; none when the client or the test has gone."""
    sock.settimeout(0.01)
    try:
        while not closing.is_set():
            with contextlib.suppress(TimeoutError):
                return sock.recv(65536)
    finally:
        sock.settimeout(10)
    return b""


# --- acts: answers that arrive ---


def answer(
    status: int, body: bytes | dict[str, Any] | list[Any] | str = b"", **headers: str
) -> Act:
    """`content_type="text/html"` becomes `Content-Type: text/html`."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    if isinstance(body, str):
        content = body.encode()

    def act(stage: Stage) -> bool:
        stage.send(head(status, Content_Length=str(len(content)), **headers) + content)
        return True

    return act


def answer_in_chunks(status: int, body: bytes, size: int = 100) -> Act:
    def act(stage: Stage) -> bool:
        pieces = [body[at : at + size] for at in range(0, len(body), size)] + [b""]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        stage.send(head(status, Transfer_Encoding="chunked") + chunks)
        return True

    return act


def answer_until_close(status: int, body: bytes) -> Act:
    def act(stage: Stage) -> None:
        stage.send(head(status) + body)

    return act


def raw(data: bytes) -> Act:
    def act(stage: Stage) -> None:
        stage.send(data)

    return act


def head(status: int, **headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status} Whatever", *lines, "", ""]).encode()


# --- acts: silence and noise ---


def hang_up_before_reading(_: Stage) -> None:
    pass


def speak_plain_http_first(stage: Stage) -> None:
    stage.send(head(400) + b"The plain HTTP request was sent to HTTPS port, or so")


def hang_up_after_reading(_: Stage) -> None:
    pass


def reset_after_reading(stage: Stage) -> None:
    # A linger of zero makes close send RST in place of FIN.
    stage.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hang_up_mid_headers(stage: Stage) -> None:
    stage.send(b"HTTP/1.1 201 Created\r\nContent-Ty")


def hang_up_mid_body(stage: Stage) -> None:
    stage.send(head(201, Content_Length="500") + b'{"data": {"id": ')


def hang_up_mid_chunk(stage: Stage) -> None:
    stage.send(head(201, Transfer_Encoding="chunked") + b'50\r\n{"data": ')


def never_answer(stage: Stage) -> None:
    stage.closing.wait(10)


def stall_mid_body(stage: Stage) -> None:
    stage.send(head(201, Content_Length="500") + b"{")
    stage.closing.wait(10)


def drip_headers(stage: Stage) -> None:
    stage.drip(b"HTTP/1.1 201 Created\r\nX-Slow: " + b"a" * 2000, every=0.02)


def drip_body(stage: Stage) -> None:
    stage.send(head(201, Content_Length="2000"))
    stage.drip(b"{" + b" " * 1999, every=0.02)


def drip_chunks(stage: Stage) -> None:
    stage.send(head(201, Transfer_Encoding="chunked"))
    stage.drip(b"1\r\n{\r\n" * 300, every=0.02)


def drip_interim_answers(stage: Stage) -> None:
    while not stage.closing.wait(0.01):
        stage.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def flood_body(stage: Stage) -> None:
    stage.send(head(201))
    while not stage.closing.is_set():
        stage.send(b" " * 65536)


def garbled_chunks(stage: Stage) -> None:
    stage.send(head(201, Transfer_Encoding="chunked") + b"zz\r\nnot a chunk\r\n")


BEFORE_READING: frozenset[Act] = frozenset({hang_up_before_reading, speak_plain_http_first})


# --- ports with nobody behind them ---


@contextlib.contextmanager
def refused_port() -> Iterator[int]:
    """Bound, so that nobody else takes it, and not listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """Its queue of connections is full: one more neither succeeds nor fails."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = listener.getsockname()[1]
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", port))
        time.sleep(0.05)
        yield port
