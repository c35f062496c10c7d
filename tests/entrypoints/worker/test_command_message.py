"""Whatever lies in the queue becomes a message, and none of it is believed or shown unredacted."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_worker.entrypoints.worker.command_message import read
from billing_worker.services.commands.records import TASKS, parse_command
from billing_worker.services.import_records.fields import LONGEST_JSON
from tests.support.processes import ROOT

DOCS = (ROOT / "docs/commands.md").read_text()

NOW = datetime(2026, 2, 1, tzinfo=UTC)
RECORD = {"reference_id": "c-1", "subscription": "sub-1"}
TOKEN = "4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x"


def message(body=([RECORD], {}, {}), headers=None, **outer):
    given = {"task": "billing.pause", "id": "id-1"} if headers is None else headers
    encoded = base64.b64encode(json.dumps(body).encode()).decode()
    whole = {
        "body": encoded, "content-type": "application/json", "content-encoding": "utf-8",
        "headers": given, "properties": {"body_encoding": "base64", "delivery_tag": "x"},
    }  # fmt: skip
    return json.dumps(whole | outer).encode()


@pytest.mark.parametrize("body", [([RECORD], {}, {}), ([], RECORD, {}), ([], RECORD)])
def test_the_record_may_stand_alone_in_args_or_be_spread_out_as_kwargs(body):
    envelope = read(message(body), NOW)
    assert envelope.message.task == "billing.pause"
    assert envelope.message.id == "id-1"
    assert envelope.message.arguments == RECORD
    assert envelope.message.faults == ()
    assert envelope.wants_answer


def test_protocol_1_has_everything_in_its_body():
    old = {"task": "billing.pause", "id": "id-1", "args": [RECORD], "kwargs": {}}
    read_ = read(message(old, headers={}), NOW).message
    assert (read_.task, read_.id, read_.arguments) == ("billing.pause", "id-1", RECORD)


def test_a_body_that_is_not_encoded_is_read_too():
    plain = message(body=None, properties={}).replace(
        b'"' + base64.b64encode(b"null") + b'"', json.dumps(json.dumps([[RECORD], {}, {}])).encode()
    )
    assert read(plain, NOW).message.arguments == RECORD


@pytest.mark.parametrize(
    ("megabytes", "task", "id_"), [(2, "billing.pause", "id-1"), (9, "", None)]
)
def test_a_message_that_is_too_long_is_refused_unparsed_and_answered_if_that_is_cheap(
    megabytes, task, id_
):
    record = RECORD | {"metadata": TOKEN, "why": "x" * megabytes * 2**20}
    raw = message(([record], {}, {}))
    envelope = read(raw, NOW)
    found = envelope.message
    assert (found.task, found.id, found.arguments) == (task, id_, None)
    assert [fault.field for fault in found.faults] == [""]
    assert "bytes" in found.faults[0].reason
    assert len(found.unreadable) < 10_000
    assert base64.b64encode(TOKEN.encode()).decode()[4:20] not in found.unreadable


def test_the_longest_command_there_may_be_is_not_too_long():
    """Every character costs six in JSON, and is encoded twice."""
    record = RECORD | {"why": "\\" * 30_000}
    assert len(json.dumps(record)) < LONGEST_JSON
    assert read(message(([record], {}, {})), NOW).message.arguments == record


def test_a_sender_may_say_that_it_wants_no_answer():
    headers = {"task": "billing.pause", "id": "id-1", "ignore_result": True}
    assert not read(message(headers=headers), NOW).wants_answer


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"", ""),
        (b"garbage", ""),
        (b"[]", ""),
        (b"5", ""),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        (b"{}", "body"),
        (message(headers=[1]), "headers"),
        (message(properties=[1]), "properties"),
        (message(body="text"), "body"),
        (message(body=[[RECORD]]), "body"),
        (message(body=7, headers={}), "body"),
        (message(**{"content-type": "application/x-python-serialize"}), "content-type"),
        (message(headers={"task": "billing.pause", "compression": "gzip"}), "compression"),
        (message().replace(b'"body": "', b'"body": "!'), "body"),
        (message(([RECORD, RECORD], {}, {})), ""),
        (message(([RECORD], RECORD, {})), ""),
        (message(({"a": 1}, {}, {})), ""),
        (message(([], [], {})), ""),
        (message(headers={"task": "billing.pause", "eta": "2030-01-01T00:00:00Z"}), "eta"),
        (message(headers={"task": "billing.pause", "expires": "2026-01-31T23:59:59"}), "expires"),
        (message(headers={"task": "billing.pause", "expires": "soon"}), "expires"),
        (message(([RECORD], {}, {"callbacks": [{"task": "x"}]})), "callbacks"),
        (message(([RECORD], {}, {"chain": [{"task": "x"}]})), "chain"),
    ],
)
def test_what_cannot_be_read_names_its_fault(raw, field):
    assert field in [fault.field for fault in read(raw, NOW).message.faults]


def test_a_message_that_has_not_expired_is_carried_out():
    headers = {"task": "billing.pause", "expires": "2026-02-01T00:00:01+00:00"}
    assert read(message(headers=headers), NOW).message.faults == ()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"card": {"token": "%b"' % TOKEN.encode(),
        b"tok %b" % TOKEN.encode(),
        message([[{"card": {"token": TOKEN}}]], properties={"body_encoding": "base64"})[:-9],
        message(TOKEN),
    ],
)
def test_what_is_kept_of_an_unreadable_message_holds_no_token(raw):
    kept = read(raw, NOW).message.unreadable
    encoded = base64.b64encode(TOKEN.encode()).decode()[4:20]
    assert kept is not None
    assert TOKEN not in kept
    assert encoded not in kept


def test_the_documented_message_is_a_command_that_can_be_read():
    [documented] = re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)
    envelope = read(documented.encode(), NOW)
    assert envelope.message.faults == ()
    assert parse_command(envelope.message.task, envelope.message.arguments).record.by


def test_every_task_is_documented():
    assert set(re.findall(r"^\| `(billing\.\w+)` \|", DOCS, re.MULTILINE)) == set(TASKS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.binary()
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.builds(message, json_values)
    | st.builds(message, headers=json_values, properties=json_values)
)
def test_no_bytes_make_the_reader_raise(raw):
    assert isinstance(read(raw, NOW).message.task, str)


@pytest.mark.parametrize("where", ["record", "envelope"])
def test_a_key_that_occurs_twice_is_refused_and_nothing_of_it_is_believed(where):
    twice = '{"reference_id": "c-1", "subscription": "sub-1", "subscription": "sub-2"}'
    text = message().decode()
    if where == "record":
        text = message(body=None).decode().replace(
            base64.b64encode(b"null").decode(),
            base64.b64encode(f"[[{twice}], {{}}, {{}}]".encode()).decode(),
        )  # fmt: skip
    else:
        text = text.replace("{", '{"properties": {}, ', 1)
    faults = read(text.encode(), NOW).message.faults
    assert any("occurs twice" in fault.reason for fault in faults)
