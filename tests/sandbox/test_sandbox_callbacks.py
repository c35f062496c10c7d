import base64
import hashlib
import itertools
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from billing_worker.sandbox.callbacks import CallbackSender, sign


class Inbox:
    """A merchant's web server: keeps what it is sent, answers what it is told."""

    def __init__(self, answers):
        self.letters = []
        self._answers = list(answers)
        self._changed = threading.Condition()

    def take(self, headers, body):
        with self._changed:
            self.letters.append((time.monotonic(), headers["X-Signature"], body))
            self._changed.notify_all()
            return self._answers.pop(0) if self._answers else 200

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.letters) >= count, 10), self.letters

    @property
    def statuses(self):
        return [json.loads(body)["data"]["attributes"]["status"] for _, _, body in self.letters]


@pytest.fixture
def inbox_at():
    @contextmanager
    def listen(*answers):
        inbox = Inbox(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(inbox.take(self.headers, body))
                self.end_headers()

            def log_message(self, *args):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            yield inbox, f"http://127.0.0.1:{server.server_port}/callback"
            server.shutdown()
            thread.join()

    return listen


def test_the_signature_is_that_of_the_documents():
    # base64(sha1_raw(secret + body + secret)), worked out with openssl.
    assert sign(b'{"data":[]}', "secret") == "5PhM0JTMLxc7O2Gr90lVT4qxJmw="


def test_a_changed_byte_changes_the_signature():
    assert sign(b'{"a":"\\/"}', "secret") != sign(b'{"a":"/"}', "secret")


def test_every_state_change_is_called_back_with_the_body_of_a_look(merchant, inbox_at):
    with inbox_at() as (inbox, url), CallbackSender(merchant.gateway):
        invoice = merchant.create(callback_url=url)
        inbox.wait_for(1)
        merchant.sell(invoice)
        inbox.wait_for(2)
        looked = merchant.request("GET", f"/payment-invoices/{invoice.gateway_id}").body

    assert inbox.statuses == ["process_pending", "processed"]
    assert inbox.letters[1][2] == looked
    for _, signature, body in inbox.letters:
        salted = b"sandbox-secret" + body + b"sandbox-secret"
        assert signature == base64.b64encode(hashlib.sha1(salted).digest()).decode()  # noqa: S324


def test_a_change_that_comes_with_time_is_called_back_though_nobody_asks(merchant, clock, inbox_at):
    with inbox_at() as (inbox, url), CallbackSender(merchant.gateway):
        merchant.sold("late_after_expiry", callback_url=url)
        inbox.wait_for(1)
        clock.move(3600)
        inbox.wait_for(2)
        clock.move(10)
        inbox.wait_for(3)

    assert inbox.statuses == ["process_pending", "expired", "processed"]


def test_an_invoice_without_a_callback_url_is_not_called_back(merchant):
    told = []
    merchant.gateway.listen(lambda url, _body: told.append(url))

    merchant.sold("approved", reference_id="silent")
    merchant.sold("approved", callback_url="https://m.example/callback")

    assert told == ["https://m.example/callback"] * 2


def test_only_a_200_ends_the_retries_and_each_waits_longer_than_the_one_before(merchant, inbox_at):
    with (
        inbox_at(500, 204, 302) as (inbox, url),
        CallbackSender(merchant.gateway, retry_seconds=0.2),
    ):
        merchant.create(callback_url=url)
        inbox.wait_for(4)
        time.sleep(0.3)

    assert len(inbox.letters) == 4
    assert len({body for _, _, body in inbox.letters}) == 1
    times = [at for at, _, _ in inbox.letters]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits[0] >= 0.2
    assert waits[1] >= 0.4
    assert waits[2] >= 0.6


def test_retries_end(merchant, inbox_at):
    with (
        inbox_at(*[500] * 10) as (inbox, url),
        CallbackSender(merchant.gateway, retry_seconds=0, attempts=3),
    ):
        merchant.create(callback_url=url)
        inbox.wait_for(3)
        time.sleep(0.3)

    assert len(inbox.letters) == 3


def test_a_dead_receiver_holds_up_no_other(merchant, inbox_at):
    with inbox_at() as (inbox, url), CallbackSender(merchant.gateway):
        merchant.create(callback_url="http://127.0.0.1:1/nobody")
        merchant.create(callback_url="http://[nonsense")
        merchant.create(callback_url=url)
        inbox.wait_for(1)
