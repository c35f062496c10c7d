"""A receiver of webhooks on a real socket, which verifies with the reference library."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

from billing_worker.clock import SystemClock


class ReceiverServer:
    """Keeps what was signed for it. `status(event)` is what it answers."""

    def __init__(self, status: Callable[[dict[str, Any]], int] = lambda _: 200) -> None:
        self.status = status
        self.secret = ""
        self.taken: list[dict[str, Any]] = []
        self.at: dict[str, float] = {}
        self.refused = 0
        self.url = ""

    def sequences(self) -> dict[str | None, list[int]]:
        """By subscription, in the order in which they were first taken."""
        seen: set[str] = set()
        found: dict[str | None, list[int]] = defaultdict(list)
        for event in list(self.taken):
            if event["id"] not in seen:
                seen.add(event["id"])
                found[event["data"]["subscription"]].append(event["data"]["sequence"])
        return dict(found)

    @contextmanager
    def listening(self) -> Iterator[ReceiverServer]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(receiver.take(dict(self.headers.items()), body))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def take(self, headers: dict[str, str], body: bytes) -> int:
        try:
            Webhook(self.secret).verify(body, {k.lower(): v for k, v in headers.items()})
        except WebhookVerificationError:
            self.refused += 1
            return 401
        event = json.loads(body)
        status = self.status(event)
        if status == 200:
            self.taken.append(event)
            self.at.setdefault(event["id"], SystemClock().now().timestamp())
        return status
