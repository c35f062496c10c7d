"""What the transport does with connections, cookies, the environment and credentials."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from billing_worker.domain.errors import OutcomeUnknown
from billing_worker.gateway import deadline
from billing_worker.gateway.http import Request, RequestsTransport
from tests.gateway.samples import patient
from tests.gateway.wire_server import (
    Stage,
    WireServer,
    answer,
    answer_in_chunks,
    hang_up_mid_body,
    head,
)

OK = answer(200, {"fine": True})


@pytest.fixture
def transport():
    yield patient()
    patient().close()


def get(url: str, path: str = "/look", **headers: str) -> Request:
    return Request("GET", url + path, headers)


def post(url: str, path: str = "/payment/sale") -> Request:
    return Request("POST", url + path, {"Authorization": "Bearer abc"}, b"{}")


# --- connections ---


def test_look_ups_share_one_connection(transport):
    with WireServer([OK]) as server:
        for _ in range(3):
            transport.send(get(server.url), moves_money=False)
    assert [request.connection for request in server.requests] == [1, 1, 1]


def test_look_ups_share_one_connection_when_answers_are_chunked(transport):
    with WireServer([answer_in_chunks(200, b'{"data": 1}' * 50)]) as server:
        bodies = {transport.send(get(server.url), moves_money=False).body for _ in range(3)}
    assert bodies == {b'{"data": 1}' * 50}
    assert server.connections == 1


def test_each_sale_has_a_fresh_connection_even_if_the_server_keeps_the_old_one(transport):
    with WireServer([OK]) as server:
        transport.send(get(server.url), moves_money=False)
        transport.send(post(server.url), moves_money=True)
        transport.send(post(server.url), moves_money=True)
        transport.send(get(server.url), moves_money=False)
    assert [request.connection for request in server.requests] == [1, 2, 3, 1]


def test_the_connection_of_a_sale_is_closed_after_it(transport):
    closed = threading.Event()

    def watch(stage: Stage) -> None:
        OK(stage)
        if stage.sock.recv(1) == b"":
            closed.set()

    with WireServer([watch]) as server:
        transport.send(post(server.url), moves_money=True)
        assert closed.wait(5)
    assert server.requests[0].headers["connection"] == "close"


def test_a_connection_with_half_an_answer_is_not_used_again(transport):
    with WireServer([hang_up_mid_body, OK]) as server:
        with pytest.raises(OutcomeUnknown):
            transport.send(get(server.url), moves_money=False)
        transport.send(get(server.url), moves_money=False)
    assert [request.connection for request in server.requests] == [1, 2]


@pytest.mark.parametrize("pause", [0, 0.05], ids=["in the same packet", "a moment later"])
def test_bytes_after_an_answer_are_not_taken_for_the_next_answer(transport, pause):
    def answer_twice(stage: Stage) -> bool:
        fine, stale = (head(200, Content_Length="5") + body for body in (b"fine!", b"stale"))
        stage.send(fine if pause else fine + stale)
        if stage.closing.wait(pause) is False and pause:
            stage.send(stale)
        return True

    with WireServer([answer_twice, answer(200, "next!")]) as server:
        transport.send(get(server.url), moves_money=False)
        time.sleep(2 * pause)
        response = transport.send(get(server.url), moves_money=False)
    assert response.body == b"next!"


def test_a_closed_transport_connects_again(transport):
    with WireServer([OK]) as server:
        for _ in range(2):
            transport.send(get(server.url), moves_money=False)
            transport.close()
    assert [request.connection for request in server.requests] == [1, 2]


def test_threads_do_not_share_a_connection(transport):
    with WireServer([OK]) as server:

        def poll() -> None:
            transport.send(get(server.url), moves_money=False)
            transport.close()

        poll_elsewhere = threading.Thread(target=poll)
        transport.send(get(server.url), moves_money=False)
        poll_elsewhere.start()
        poll_elsewhere.join()
    assert server.connections == 2


def test_a_forked_child_does_not_write_to_the_connection_of_its_parent(transport, monkeypatch):
    with WireServer([OK]) as server:
        transport.send(get(server.url), moves_money=False)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        transport.send(get(server.url), moves_money=False)
    assert [request.connection for request in server.requests] == [1, 2]


def test_a_kept_connection_gets_a_new_deadline_for_each_call():
    def answer_late(stage: Stage) -> bool:
        stage.closing.wait(0.3)
        return bool(OK(stage))

    transport = RequestsTransport(read_timeout=1, connect_timeout=0.1)
    with WireServer([answer_late]) as server:
        for _ in range(4):  # Together longer than the 1.1 s of a single call.
            transport.send(get(server.url), moves_money=False)
        transport.close()
    assert server.connections == 1


def test_a_connection_outside_a_deadline_does_not_wait_without_limit():
    pool = deadline.POOLS_BY_SCHEME["http"]
    with (
        WireServer([OK]) as server,
        pool("127.0.0.1", server.port) as unbounded,
        pytest.raises(LookupError),
    ):
        unbounded.request("GET", "/")


def test_more_patience_than_five_seconds_is_for_reading_only():
    assert RequestsTransport(read_timeout=30)._connect_timeout == 5
    assert RequestsTransport(read_timeout=2)._connect_timeout == 2


# --- what must not travel ---


def test_cookies_are_not_carried_from_one_call_to_the_next(transport):
    with WireServer([answer(200, {}, Set_Cookie="session=of-another-customer; Path=/")]) as server:
        for moves_money in (False, False, True, True):
            transport.send(post(server.url), moves_money=moves_money)
    assert [request.headers.get("cookie") for request in server.requests] == [None] * 4


def test_a_netrc_does_not_replace_the_authorization(transport, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with WireServer([OK]) as server:
        for moves_money in (False, True):
            transport.send(post(server.url), moves_money=moves_money)
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer abc"}


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_not_used(transport, monkeypatch, variable):
    with WireServer([OK]) as proxy, WireServer([OK]) as server:
        monkeypatch.setenv(variable, proxy.url)
        for moves_money in (False, True):
            transport.send(post(server.url), moves_money=moves_money)
    assert proxy.connections == 0
    assert len(server.requests) == 2


def test_a_certificate_bundle_of_the_environment_is_not_trusted(
    monkeypatch, certificate, server_tls
):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(certificate))
    with (
        WireServer([OK], tls=server_tls) as server,
        pytest.raises(OutcomeUnknown, match="TLS failure"),
    ):
        RequestsTransport().send(get(server.url), moves_money=False)
    assert server.requests == []


def test_a_kept_tls_connection_is_verified_and_shared(certificate, server_tls):
    transport = RequestsTransport(ca_bundle=str(certificate))
    with WireServer([OK], tls=server_tls) as server:
        for _ in range(3):
            assert transport.send(get(server.url), moves_money=False).status == 200
        transport.close()
    assert server.connections == 1


def test_nothing_of_a_request_or_its_answer_is_logged(transport, caplog):
    caplog.set_level(logging.DEBUG)
    with WireServer([answer(200, {"token": "of-the-answer"}, Broken="a\r\n b")]) as server:
        transport.send(post(server.url), moves_money=True)
    assert "abc" not in caplog.text
    assert "of-the-answer" not in caplog.text
