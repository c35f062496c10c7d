from __future__ import annotations

import json

import pytest

from billing_worker.entrypoints.worker.strict_transport import _read

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (TRACE, TRACE),
        (TRACE.upper(), None),
        (f"{TRACE}\n", None),
        (f"{TRACE}-more", None),
        ("", None),
        (None, None),
        (5, None),
        ({"a": 1}, None),
    ],
)
def test_a_trace_of_the_sender_is_passed_on_only_in_its_own_form(given, passed_on):
    message = {
        "headers": {"task": "billing.charge", "id": "one", "traceparent": given},
        "content-type": "application/json",
        "properties": {},
        "body": json.dumps([[[1]], {}, {}]),
    }
    assert _read(message, "billing.charges")["headers"].get("traceparent") == passed_on
