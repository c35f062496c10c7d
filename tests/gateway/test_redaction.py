"""What may not be written down, in every spelling in which it may turn up."""

from __future__ import annotations

import json
import time

import pytest

from billing_worker.domain.secret import Secret
from billing_worker.gateway.redaction import (
    LONGEST_EXCERPT,
    excerpt,
    legible,
    redact,
    redact_body,
    stated,
)
from tests.gateway.samples import BEARER, PASSWORD, TOKEN, body


@pytest.mark.parametrize(
    "text",
    [
        PASSWORD,
        f"token {TOKEN} unknown",
        r"s3cr\/et key+of&the account",
        "s3cr%2Fet%20key%2Bof%26the%20account",
        f'{{"detail": "{PASSWORD}{TOKEN}"}}',
    ],
)
def test_a_known_secret_is_hidden_in_every_spelling(text):
    hidden = redact(text, [Secret(TOKEN), Secret(PASSWORD)])
    assert TOKEN not in hidden
    assert "s3cr" not in hidden
    assert "***" in hidden


def test_a_known_secret_outside_ascii_is_hidden_in_json():
    assert redact(r"cl\u00e9", [Secret("clé")]) == "***"


def test_an_empty_secret_hides_nothing():
    assert redact("abc", [Secret("")]) == "abc"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ('{"token": "abc", "a": 1}', '{"token": "***", "a": 1}'),
        ('{"Token":"abc"}', '{"Token":"***"}'),
        ('{"access_token": "abc"}', '{"access_token": "***"}'),
        ('{"cardToken": "abc"}', '{"cardToken": "***"}'),
        ('{"password" : "a\\"b", "c": 1}', '{"password" : "***", "c": 1}'),
        ('{"token": "cut sho', '{"token": "***"'),
        ('{"cvv": 123}', '{"cvv": "***"}'),
        ('{"pan": "4111", "span": "4111"}', '{"pan": "***", "span": "4111"}'),
        ('{"card_number": ["4111", "1111"], "a": 1}', '{"card_number": "***", "a": 1}'),
        ('{"token": {"value": "abc"}, "a": 1}', '{"token": "***", "a": 1}'),
        ('{"log": "{\\"token\\": \\"abc\\", \\"a\\": 1}"}', '{"log": "{\\"token\\": \\"***\\", \\"a\\": 1}"}'),
        ('{"action": "https://x.test/hpp/cgi_1", "a": 1}', '{"action": "***", "a": 1}'),
        ('{"params": {"MD": "a} b", "x": "y"}, "a": 1}', '{"params": "***", "a": 1}'),
        ('{"params": {"MD": "a\\" } b"}, "a": 1}', '{"params": "***", "a": 1}'),
        ('{"params": {"MD": "cut } sho', '{"params": "***"'),
        ('{"log": "{\\"params\\": {\\"x\\": \\"y}\\"}, \\"a\\": 1}"}', '{"log": "{\\"params\\": "***", \\"a\\": 1}"}'),
        ("&quot;token&quot;:&quot;abc&quot;", '"token":"***"'),
        ("/return?access_token=abc&a=1", "/return?access_token=***&a=1"),
        ("Authorization: Basic Y29tYV8x", "Authorization: ***"),
        ("authorization: bearer abc.def", "authorization: ***"),
        (f"the session {BEARER} is over", "the session *** is over"),
        ('"eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzUxMiJ9*****"', '"***"'),
        ("card 5123817234060000 12/32", "card *** 12/32"),
        ("5123 8172 3406 0000", "***"),
        ("5123-8172-3406-0000", "***"),
        ("3782-822463-10005", "***"),
    ],
)  # fmt: skip
def test_what_polls_like_a_secret_is_hidden(text, hidden):
    assert redact(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        '{"token": null, "tokenize": true}',
        '{"mask": "512381******0000"}',
        '{"reference_id": "5123817234060001"}',
        '{"created": 1585175055, "updated": 1585175056}',
        "12345678901234567890",
        '{"a": [1, 2, {"b": "c"}]}',
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize("number", ["06", "17", "19", "09"])
def test_an_example_loses_its_bearer_and_its_page_and_nothing_else(number):
    lines = body(number).decode().splitlines()
    hidden = redact("\n".join(lines)).splitlines()
    changed = [
        old.split(":")[0].strip() for old, new in zip(lines, hidden, strict=True) if old != new
    ]
    page = ['"action"', '"params"', '"sid"', '"token"']
    assert changed == ([] if number == "09" else page + ['"hpp_url"'] * (number == "17"))


def test_a_request_is_hidden_by_name_and_by_value():
    request = {
        "token": TOKEN,
        "cvv": 123,
        "customer": {"name": f"Jo {PASSWORD}"},
        "list": [TOKEN, 1],
    }
    hidden = redact_body(request, [Secret(TOKEN), Secret(PASSWORD)])
    assert hidden == {
        "token": "***",
        "cvv": "***",
        "customer": {"name": "Jo ***"},
        "list": ["***", 1],
    }
    assert request["token"] == TOKEN


def test_an_excerpt_is_cut_after_it_was_redacted():
    shown = excerpt(b"x" * (LONGEST_EXCERPT - 10) + TOKEN.encode(), [Secret(TOKEN)])
    assert shown == "x" * (LONGEST_EXCERPT - 10) + "***"


def test_an_excerpt_is_at_most_as_long_as_promised():
    assert len(excerpt(b"x" * 10_000)) == LONGEST_EXCERPT


def test_an_excerpt_fits_a_database_and_a_terminal():
    shown = excerpt(b"a\x00b\x1b[2J\xff\x80\n\tc")
    assert shown == "a�b�[2J��\n\tc"
    legible("\ud800").encode()


@pytest.mark.parametrize(
    "unit",
    ['"token":"', '"', "a", "4", "\\", "1-", "1 ", "1" + " " * 11, "eyJ", "token=", "a=b", "=", "&quot;",
     "Bearer ", '"token":[', '"params":{', '"params":{"', '"params":{}', '\\"', '"a":', '"token"' + " " * 50, "eyJaaaaaa ", "\x00"],
)  # fmt: skip
def test_a_quarter_megabyte_of_anything_is_redacted_in_linear_time(unit):
    text = unit * (2**18 // len(unit))
    started = time.process_time()
    redact(text, [Secret(TOKEN)])
    # About 0.1 s at the worst; anything quadratic takes minutes.
    assert time.process_time() - started < 5


def test_of_an_answer_only_the_named_fields_are_stated():
    said = {
        "data": {
            "id": "cpi_1",
            "attributes": {
                "status": "processed",
                "amount": 9.99,
                "message": "card 4c9jHU is new",
                "callback_logs": [{"status": 200, "response": "card 4c9jHU"}, "4c9jHU"],
                "resolution": {"card": "4c9jHU"},
            },
        },
        "4c9jHU": "4c9jHU",
    }
    assert json.loads(
        stated(json.dumps(said).encode(), {"id", "status", "amount", "resolution"})
    ) == {
        "data": {
            "id": "cpi_1",
            "attributes": {
                "status": "processed",
                "amount": 9.99,
                "callback_logs": [{"status": 200}],
            },
        }
    }


@pytest.mark.parametrize("body", [b"", b"card 4c9jHU", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_nothing_is_stated_of_what_is_no_json(body):
    assert stated(body, {"a"}) == f"no JSON, {len(body)} bytes"


@pytest.mark.parametrize("body", [b"null", b"[]", b'"card 4c9jHU"', b'{"a": "card 4c9jHU"}'])
def test_an_answer_without_any_named_field_states_nothing(body):
    assert "4c9jHU" not in stated(body, {"status"})
