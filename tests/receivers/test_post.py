"""What becomes of one request, by what the receiver does with it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from billing_worker.domain.outgoing.webhooks import in_words
from billing_worker.receivers.post import LONGEST_REPLY, Answer, Poster
from tests.support.tls_proxy import TlsProxy


@contextmanager
def receiver(*pieces, pause=0.0, ever=False):
    """Answers one connection with these bytes. Yields its URL and what it was sent."""
    got = bytearray()
    sent = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                while b"\r\n\r\n{}" not in got:
                    got.extend(connection.recv(65_536))
                try:
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause)
                    while ever:
                        connection.sendall(b"x" * 65_536)
                        sent.append(65_536)
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/hook", got, sent
        thread.join(5)


def post(url, deadline=5.0):
    return Poster(allow_private=True, deadline=deadline)(url, {"webhook-id": "evt_1"}, b"{}")


def test_an_answer_is_its_status_and_what_it_asks_for():
    with receiver(b"HTTP/1.1 503 no\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n") as (
        url,
        got,
        _,
    ):
        answer = post(url)
    assert (answer.status, answer.retry_after, answer.reason) == (503, "7", None)
    assert b"webhook-id: evt_1" in got


def test_a_redirect_is_not_followed():
    with receiver(b"HTTP/1.1 302 go\r\nLocation: /in\r\nContent-Length: 0\r\n\r\n") as (url, _, _):
        assert post(url).status == 302


def test_an_endless_body_is_cut_and_is_no_answer():
    head = b"HTTP/1.1 200 ok\r\nContent-Length: 3000000000\r\n\r\n"
    with receiver(head, ever=True) as (url, _, sent):
        started = time.monotonic()
        answer = post(url)
        assert time.monotonic() - started < 2
    assert sum(sent) < 3_000_000_000 / 100
    assert in_words(answer.status, answer.reason) == "its answer is longer than 64 kB"


@pytest.mark.parametrize("length", [0, 1, LONGEST_REPLY])
def test_an_answer_of_64_kb_is_one(length):
    head = f"HTTP/1.1 200 ok\r\nContent-Length: {length}\r\n\r\n".encode()
    with receiver(head, b"x" * length) as (url, _, _):
        assert post(url) == Answer(200)


def test_a_receiver_that_drips_is_left_at_the_deadline():
    with receiver(*[b"H"] * 50, pause=0.1) as (url, _, _):
        started = time.monotonic()
        answer = post(url, deadline=0.5)
        assert time.monotonic() - started < 2
    assert answer.status is None
    assert "deadline" in answer.reason


@pytest.mark.parametrize(
    ("pieces", "words"),
    [((), "hung up"), ((b"220 mail.example ESMTP\r\n",), "not HTTP")],
)
def test_what_is_no_answer_says_why(pieces, words):
    with receiver(*pieces) as (url, _, _):
        answer = post(url)
    assert answer.status is None
    assert words in answer.reason


def test_a_certificate_that_nobody_vouches_for_is_a_failed_try_and_gets_nothing(tmp_path):
    proxy = TlsProxy(tmp_path, target_port=1)
    answer = post(f"https://localhost:{proxy.port}/hook")
    proxy.close()
    assert answer == Answer(None, "TLS failure (SSLCertVerificationError)")
    assert proxy.heard == b""


def test_nobody_there_is_a_failed_try():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert post(f"http://127.0.0.1:{port}/").status is None
