"""No secret in an exception, its traceback with local variables, or the log of calls."""

from __future__ import annotations

import json
import traceback

import pytest

from billing_worker.domain.errors import GatewayError
from billing_worker.domain.secret import Secret
from tests.gateway import wire_server as wire
from tests.gateway.samples import (
    BASIC,
    BEARER,
    GATEWAY_ID,
    PASSWORD,
    TOKEN,
    canned,
    impatient,
    invoice,
    order,
    patient,
    paycore,
)
from tests.gateway.wire_server import Stage, WireServer, answer

OTHERS_BEARER = "eyJhbGciOiJIUzI1NiJ9.eyJzaWQiOiJjZ2lfMiJ9.b3RoZXI"
SECRETS = {TOKEN, BEARER, PASSWORD, PASSWORD.replace("/", r"\/"), BASIC, OTHERS_BEARER}

VERBS = {
    "create": lambda gateway, calls: gateway.create(order(customer_name="Jo"), calls),
    "find": lambda gateway, calls: gateway.find("ORDER1233", calls),
    "look": lambda gateway, calls: gateway.poll(GATEWAY_ID, calls),
    "sale": lambda gateway, calls: gateway.sale(Secret(BEARER), calls),
}


def echo(status: int, shape: str = "{}"):
    """Answer with everything that was sent, as a debug page does."""

    def act(stage: Stage) -> bool:
        request = stage.request
        sent = f"{request.headers} {request.body.decode()} {PASSWORD}"
        return bool(answer(status, shape.replace("{}", json.dumps(sent)))(stage))

    return act


WITH_BEARER = {"flow_data": {"metadata": {"token": OTHERS_BEARER}}}
FAILURES = {
    "silence": wire.never_answer,
    "hang-up": wire.hang_up_after_reading,
    "reset": wire.reset_after_reading,
    "early hang-up": wire.hang_up_before_reading,
    "half a body": wire.hang_up_mid_body,
    "garbled chunks": wire.garbled_chunks,
    "redirect": answer(307, Location="https://elsewhere.example/"),
    "no header": wire.raw(f"HTTP/1.1 200 OK\r\n{BEARER}\r\n\r\n{BEARER}".encode()),
    "no status line": wire.raw(f"{BEARER}\r\n\r\n".encode()),
    "debug page": echo(500),
    "debug object": echo(200, '{"data": {}}'),
    "own error": echo(422, '{"errors": [{"title": {}}]}'),
    "status of wrong type": answer(200, invoice(status=[OTHERS_BEARER], **WITH_BEARER)),
    "amount of wrong type": answer(200, invoice(amount=OTHERS_BEARER, **WITH_BEARER)),
    "not JSON": answer(200, f"<html>{BEARER}{PASSWORD}{OTHERS_BEARER}</html>"),
    "cut JSON": answer(200, f'{{"data": {{"token": "{OTHERS_BEARER}"'),
}


def everything_about(error: BaseException | None) -> str:
    """Message, repr, attributes and traceback with locals, of the error and of what it hides."""
    if error is None:
        return ""
    told = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "\n".join(
        [
            str(error),
            repr(error),
            repr(vars(error)),
            *told.format(chain=True),
            everything_about(error.__cause__),
            everything_about(error.__context__),
        ]
    )


def fail(verb: str, gateway, calls) -> GatewayError | None:
    try:
        VERBS[verb](gateway, calls)
    except GatewayError as error:
        return error
    return None


def assert_tells_nothing(error, calls) -> None:
    told = (
        everything_about(error) + repr(calls) + json.dumps([[c.request, c.answer] for c in calls])
    )
    assert not [secret for secret in SECRETS if secret in told]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_tells_no_secret(verb, failure, calls):
    with WireServer([FAILURES[failure]]) as server:
        silent = FAILURES[failure] is wire.never_answer
        gateway = paycore(server.url, impatient() if silent else patient())
        error = fail(verb, gateway, calls)
    assert calls
    assert_tells_nothing(error, calls)


@pytest.mark.parametrize("verb", VERBS)
def test_a_refused_connection_tells_no_secret(verb, calls):
    with wire.refused_port() as port:
        error = fail(verb, paycore(f"http://127.0.0.1:{port}"), calls)
    assert error is not None
    assert_tells_nothing(error, calls)


@pytest.mark.parametrize("verb", VERBS)
def test_an_untrusted_certificate_tells_no_secret(verb, calls, server_tls):
    with WireServer([answer(200, {})], tls=server_tls) as server:
        error = fail(verb, paycore(server.url), calls)
    assert error is not None
    assert_tells_nothing(error, calls)


@pytest.mark.parametrize("verb", VERBS)
def test_an_error_has_no_hidden_context(verb, calls):
    with WireServer([wire.hang_up_after_reading]) as server:
        error = fail(verb, paycore(server.url), calls)
    assert error.__context__ is None
    assert error.__cause__ is None


def test_the_error_of_a_second_find_has_no_context_either(calls):
    with WireServer([answer(404), wire.hang_up_after_reading]) as server:
        error = fail("find", paycore(server.url), calls)
    assert error.__context__ is None


def test_a_success_tells_no_secret(calls):
    statement = canned(201, invoice(payload={"token": TOKEN}, **WITH_BEARER)).create(order(), calls)
    assert statement.bearer == Secret(OTHERS_BEARER)
    told = repr(statement) + repr(calls)
    assert not [secret for secret in SECRETS if secret in told]


def test_the_title_of_a_refusal_tells_no_secret(calls):
    content = {"errors": [{"title": f"token {TOKEN} of {PASSWORD} is dead, use 5123817234060000"}]}
    error = fail("create", canned(422, content), calls)
    assert error.reason == "422 token *** of *** is dead, use ***"
    assert calls[0].outcome == f"refused: {error.reason}"


def test_these_tests_would_notice_a_secret_in_a_local_variable():
    def leak(variable: str) -> None:
        raise ValueError(len(variable))

    with pytest.raises(ValueError, match="39") as caught:
        leak(TOKEN)
    assert TOKEN in everything_about(caught.value)
