"""POST /payment/sale over real sockets: one test per way it can end. It moves money, so each
asserts that the gateway saw the request at most once, and what the client concludes from it.
"""

from __future__ import annotations

import json
import socket
import ssl
import time

import pytest

from billing_worker.domain.errors import GatewayError, NotSent, OutcomeUnknown, Refused
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import SaleAnswer
from billing_worker.gateway.http import LONGEST_ANSWER, RequestsTransport, Transport
from billing_worker.gateway.port import CallLog
from tests.gateway import wire_server as wire
from tests.gateway.samples import BEARER, body, exact, impatient, paycore
from tests.gateway.wire_server import Act, WireServer, answer

OWN_ERROR = {"errors": [{"title": "Unprocessable Content", "status": "422", "detail": "..."}]}


def sell(
    act: Act,
    calls: CallLog,
    transport: Transport | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[SaleAnswer | GatewayError, WireServer]:
    """Send one sale to a server that does this, and again if it is asked again."""
    with WireServer([act], tls=tls) as server:
        try:
            outcome: SaleAnswer | GatewayError = paycore(server.url, transport).sale(
                Secret(BEARER), calls
            )
        except GatewayError as error:
            outcome = error
        # A second request would need a moment to arrive.
        time.sleep(0.02)
    return outcome, server


def assert_unknown(
    act: Act,
    reason: str,
    *,
    http_status: int | None = None,
    transport: Transport | None = None,
) -> None:
    calls: CallLog = []
    outcome, server = sell(act, calls, transport)
    assert type(outcome) is OutcomeUnknown
    assert reason in outcome.reason
    assert outcome.http_status == http_status
    assert [call.outcome for call in calls] == [f"unknown: {outcome.reason}"]
    assert server.count("/payment/sale") == 1
    assert server.connections == 1


def test_the_sale_is_the_request_of_the_seed(calls):
    _, server = sell(answer(200, body("90")), calls)
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", "/payment/sale")
    assert exact(request.body) == exact(body("07"))
    assert request.headers["authorization"] == f"Bearer {BEARER}"
    assert request.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("number", "status", "resolution", "needs_customer"),
    [
        ("10", "process_pending", "ok", True),  # `active_payment` is `authorize_required`
        ("11", None, None, True),
        ("12", None, None, True),
        ("90", "processed", None, False),
        ("91", "process_pending", None, True),
        ("92", "process_failed", "insufficient_funds", False),
    ],
)
def test_each_known_answer_is_understood(number, status, resolution, needs_customer, calls):
    outcome, server = sell(answer(201, body(number)), calls)
    assert outcome == SaleAnswer(201, status, resolution, needs_customer=needs_customer)
    assert server.count("/payment/sale") == 1


def test_an_object_of_unknown_shape_is_an_answer_without_status(calls):
    outcome, _ = sell(answer(200, {"status": ["processed"], "news": 1}), calls)
    assert outcome == SaleAnswer(200)


# --- certain: not sent ---


def test_a_refused_connection_means_not_sent(calls):
    with wire.refused_port() as port, pytest.raises(NotSent, match="no connection"):
        paycore(f"http://127.0.0.1:{port}").sale(Secret(BEARER), calls)
    assert [call.outcome for call in calls] == ["not sent: no connection"]


def test_a_connection_that_is_never_accepted_means_not_sent(calls):
    with wire.deaf_port() as port, pytest.raises(NotSent, match="connect timeout"):
        paycore(f"http://127.0.0.1:{port}", impatient()).sale(Secret(BEARER), calls)


def test_an_unknown_host_name_means_not_sent(calls, monkeypatch):
    def look_up(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(NotSent, match="name look-up failed"):
        paycore("http://gateway.example").sale(Secret(BEARER), calls)


def test_a_name_look_up_beyond_the_deadline_means_not_sent(calls, monkeypatch):
    look_up = socket.getaddrinfo

    def slow_look_up(*args, **kwargs):
        time.sleep(0.5)
        return look_up(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
    outcome, server = sell(answer(200, body("90")), calls, impatient())
    assert type(outcome) is NotSent
    assert server.requests == []


def test_a_sale_is_not_sent_on_a_connection_that_took_longer_than_the_connect_timeout(
    calls, monkeypatch
):
    """The answer may take its time; what comes before the sale may not."""
    look_up = socket.getaddrinfo

    def slow_look_up(*args, **kwargs):
        time.sleep(0.5)
        return look_up(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
    transport = RequestsTransport(connect_timeout=0.3, read_timeout=30)
    outcome, server = sell(answer(200, body("90")), calls, transport)
    assert type(outcome) is NotSent
    assert server.requests == []
    transport.close()


def test_a_bearer_that_would_add_a_header_is_not_sent(calls):
    outcome = None
    with WireServer([answer(200, body("90"))]) as server:
        try:
            paycore(server.url).sale(Secret("abc\r\nX-Evil: 1"), calls)
        except NotSent as error:
            outcome = error
    assert outcome is not None
    assert server.connections == 0
    assert calls == []


# --- unknown: the connection breaks ---


def test_a_hang_up_before_the_request_is_read_is_unknown(calls):
    outcome, server = sell(wire.hang_up_before_reading, calls)
    assert type(outcome) is OutcomeUnknown
    assert server.connections == 1


def test_a_hang_up_after_the_request_was_read_is_unknown():
    assert_unknown(wire.hang_up_after_reading, "hung up without an answer")


def test_a_reset_connection_is_unknown():
    assert_unknown(wire.reset_after_reading, "connection lost")


def test_a_hang_up_within_the_headers_is_unknown():
    # http.client takes the end of the stream for the end of the headers; no body follows.
    assert_unknown(wire.hang_up_mid_headers, "not JSON", http_status=201)


def test_a_hang_up_within_the_body_is_unknown():
    assert_unknown(wire.hang_up_mid_body, "cut short")


def test_a_hang_up_within_a_chunk_is_unknown():
    assert_unknown(wire.hang_up_mid_chunk, "cut short")


def test_an_answer_that_ends_early_without_a_length_is_unknown():
    assert_unknown(wire.answer_until_close(200, b'{"status": "proc'), "not JSON", http_status=200)


# --- unknown: the answer does not come in time ---


PATIENCE_SECONDS = 8
"""The whole call gets 0.4 s, the acts below go on for 10 s or more, and test machines are busy."""


def assert_bounded(act: Act, reason: str) -> None:
    started = time.monotonic()
    assert_unknown(act, reason, transport=impatient())
    assert time.monotonic() - started < PATIENCE_SECONDS


def test_a_silent_server_is_unknown_after_the_read_timeout():
    assert_bounded(wire.never_answer, "timeout (TimeoutError)")


def test_a_body_that_stalls_is_unknown_after_the_read_timeout():
    assert_bounded(wire.stall_mid_body, "timeout (TimeoutError)")


def test_dripping_headers_cannot_outlive_the_total_deadline():
    assert_bounded(wire.drip_headers, "total deadline passed")


def test_a_dripping_body_cannot_outlive_the_total_deadline():
    assert_bounded(wire.drip_body, "total deadline passed")


def test_dripping_chunks_cannot_outlive_the_total_deadline():
    assert_bounded(wire.drip_chunks, "total deadline passed")


def test_endless_interim_answers_cannot_outlive_the_total_deadline():
    assert_bounded(wire.drip_interim_answers, "total deadline passed")


def test_dripping_through_tls_cannot_outlive_the_total_deadline(server_tls, certificate, calls):
    transport = RequestsTransport(read_timeout=0.3, connect_timeout=0.3, ca_bundle=str(certificate))
    for act in (wire.drip_headers, wire.drip_body):
        started = time.monotonic()
        outcome, server = sell(act, calls, transport, server_tls)
        assert time.monotonic() - started < PATIENCE_SECONDS
        assert isinstance(outcome, OutcomeUnknown)
        assert "total deadline passed" in outcome.reason
        assert server.count("/payment/sale") == 1


# --- unknown: the answer is not one ---


def test_an_endless_body_is_unknown_and_not_kept():
    assert_unknown(wire.flood_body, "too large", http_status=201)


def test_a_body_one_byte_over_the_limit_is_unknown():
    too_large = b"{" + b" " * (LONGEST_ANSWER - 1) + b"}"
    assert_unknown(answer(200, too_large), "too large", http_status=200)


def test_a_body_of_exactly_the_limit_is_read(calls):
    just_fits = b'{"status": "processed"' + b" " * (LONGEST_ANSWER - 23) + b"}"
    outcome, _ = sell(answer(200, just_fits), calls)
    assert outcome == SaleAnswer(200, "processed")


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_a_redirect_is_unknown_and_never_followed(status):
    with WireServer([answer(200, body("90"))]) as elsewhere:
        act = answer(status, b"", Location=f"{elsewhere.url}/payment/sale")
        assert_unknown(act, "redirect, not followed", http_status=status)
    assert elsewhere.connections == 0


def test_the_body_of_a_redirect_is_not_read():
    sent = 0

    def act(stage: wire.Stage) -> None:
        nonlocal sent
        stage.send(wire.head(307, Location="/payment/sale"))
        while True:
            stage.send(b" " * 65536)
            sent += 65536

    assert_unknown(act, "redirect, not followed", http_status=307)
    # What fits into the buffers of the two sockets.
    assert sent < 16 * LONGEST_ANSWER


def test_a_compressed_answer_is_unknown():
    act = answer(200, b"\x1f\x8b", Content_Encoding="gzip")
    assert_unknown(act, "compressed", http_status=200)


def test_no_compression_is_asked_for(calls):
    _, server = sell(answer(200, body("90")), calls)
    assert server.requests[0].headers["accept-encoding"] == "identity"


def test_garbled_chunks_are_unknown():
    assert_unknown(wire.garbled_chunks, "cut short")


def test_two_different_content_lengths_are_unknown():
    headers = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n"
    assert_unknown(wire.raw(headers + b"{} "), "")


def test_something_that_is_not_http_is_unknown():
    assert_unknown(wire.raw(b"220 mail.example ESMTP\r\n"), "not HTTP")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>Bad gateway</html>",
        b"null",
        b"[]",
        b'"processed"',
        b'{"status": "processed"',
        b'{"status": NaN}',
        b'{"status": "processed", "status": "process_failed"}',
        b'{"status": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b'{"a": 1e99999999999999999999}',
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_success_that_is_no_json_object_is_unknown(content):
    assert_unknown(answer(200, content), "200", http_status=200)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_server_error_is_unknown_even_in_the_gateways_own_shape(status):
    assert_unknown(answer(status, OWN_ERROR), f"status {status}", http_status=status)


@pytest.mark.parametrize("status", [408, 409, 425, 429])
def test_an_ambiguous_4xx_is_unknown_even_in_the_gateways_own_shape(status):
    assert_unknown(answer(status, OWN_ERROR), f"status {status}", http_status=status)


def test_a_retry_after_header_does_not_repeat_the_sale():
    assert_unknown(answer(503, b"", Retry_After="0"), "status 503", http_status=503)
    assert_unknown(answer(429, b"", Retry_After="0"), "status 429", http_status=429)


def test_a_4xx_of_a_proxy_is_unknown():
    act = answer(403, "<html>Forbidden</html>", Content_Type="text/html")
    assert_unknown(act, "status 403", http_status=403)


# --- certain: refused ---


@pytest.mark.parametrize(
    ("content", "title"),
    [
        (OWN_ERROR, "Unprocessable Content"),
        ({"errors": [{"detail": "no such session"}]}, "no such session"),
        ({"error": {"message": "Token expired"}}, "Token expired"),
        ({"request_id": "r", "error_type": "INVALID", "error_codes": []}, "INVALID"),
    ],
)
def test_a_clear_4xx_in_the_gateways_own_shape_is_a_refusal(content, title, calls):
    outcome, server = sell(answer(422, content), calls)
    assert type(outcome) is Refused
    assert outcome.http_status == 422
    assert outcome.reason == f"422 {title}"
    assert server.count("/payment/sale") == 1
    assert calls[0].outcome == f"refused: 422 {title}"
    assert json.loads(calls[0].answer) == content


# --- TLS ---


def test_a_trusted_certificate_is_accepted(server_tls, certificate, calls):
    transport = RequestsTransport(ca_bundle=str(certificate))
    outcome, _ = sell(answer(200, body("90")), calls, transport, server_tls)
    assert outcome == SaleAnswer(200, "processed")


def test_an_untrusted_certificate_is_unknown_and_no_request_follows_it(server_tls, calls):
    outcome, server = sell(answer(200, body("90")), calls, tls=server_tls)
    assert type(outcome) is OutcomeUnknown
    assert "TLS failure" in outcome.reason
    assert server.requests == []


def test_a_certificate_for_another_name_is_unknown(server_tls, certificate, calls):
    with WireServer([answer(200, body("90"))], tls=server_tls) as server:
        gateway = paycore(
            server.url.replace("127.0.0.1", "localhost"),
            RequestsTransport(ca_bundle=str(certificate)),
        )
        with pytest.raises(OutcomeUnknown, match="TLS failure"):
            gateway.sale(Secret(BEARER), calls)
    assert server.requests == []


def test_a_handshake_that_never_ends_is_unknown_and_not_called_unsent(calls):
    with WireServer([wire.never_answer]) as server:
        gateway = paycore(server.url.replace("http:", "https:"), impatient())
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown, match="timeout"):
            gateway.sale(Secret(BEARER), calls)
    assert time.monotonic() - started < PATIENCE_SECONDS


def test_a_server_without_tls_is_unknown(calls):
    with WireServer([wire.speak_plain_http_first]) as server:
        gateway = paycore(server.url.replace("http:", "https:"))
        with pytest.raises(OutcomeUnknown):
            gateway.sale(Secret(BEARER), calls)
