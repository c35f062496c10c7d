"""The producer for other services: light, typed, and sending what the worker reads."""

from __future__ import annotations

import base64
import inspect
import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from billing_worker.client import QUEUE, BillingClient
from billing_worker.entrypoints.worker.command_message import read
from billing_worker.entrypoints.worker.doorbell import COMMANDS
from billing_worker.services.commands.records import TASKS, parse_command
from tests.support.processes import ROOT, clean_environment

NOW = datetime(2026, 2, 1, tzinfo=UTC)
CUSTOMER = {"reference_id": "cust-1", "name": "Jo Doe"}
CARD = {"token": "4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x"}
ABOUT = {"reference_id": "c-1", "subscription": "sub-1"}
CALLS = {
    "subscribe": {
        "reference_id": "sub-1", "customer": CUSTOMER, "card": CARD, "amount": "9.99",
        "currency": "USD", "interval": "month", "anchor_at": NOW,
    },
    "change_subscription": ABOUT | {"amount": "12.00"},
    "pause": ABOUT,
    "resume": ABOUT | {"shift_anchor": True},
    "cancel": ABOUT | {"at_period_end": True, "void_open": True},
    "uncancel": ABOUT,
    "end": ABOUT | {"void_open": True},
    "retry": {"reference_id": "r-1", "invoice": "sub-1-p0", "by": "ann"},
    "describe": {"invoice": "sub-1-p0"},
    "forgive": ABOUT | {"by": "ann", "why": "goodwill"},
    "remove_card": {"reference_id": "r-1", "customer": "ann", "card_id": 7, "by": "ann",
                    "why": "asked"},
    "update_customer": {"reference_id": "r-1", "customer": "ann", "name": "Ann B.",
                        "email": "ann@example.com", "by": "ann", "why": "married"},
    "replace_card": ABOUT | {"card": CARD, "scope": "customer", "by": "ann", "why": "expired"},
    "use_card": ABOUT | {"card_id": 7, "scope": "customer", "by": "ann", "why": "expired"},
    "charge_once": {
        "reference_id": "o-1", "customer": CUSTOMER, "amount": "5.00", "currency": "EUR",
    },
    "cancel_charge": {"reference_id": "b-1", "charge": "o-1", "why": "wrong customer"},
    "start_tokenisation": {
        "reference_id": "t-1", "customer": CUSTOMER, "amount": "1.00", "currency": "USD",
    },
    "start_checkout": {"reference_id": "k-1", "invoice": "sub-1-p0"},
}  # fmt: skip
IMPORT_ALONE = """
import sys, json
from billing_worker.client import BillingClient
BillingClient("redis://127.0.0.1:1/0")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture
def sent(tmp_path):
    """What a call writes to a broker that is a folder: the message as the queue holds it."""
    client = BillingClient("filesystem://", answers=False)
    client._app.conf.broker_transport_options = {
        "data_folder_in": str(tmp_path), "data_folder_out": str(tmp_path),
        "control_folder": str(tmp_path / "control"),
    }  # fmt: skip

    def sent(method, **arguments):
        getattr(client, method)(**arguments)
        [file] = tmp_path.glob("*.msg")
        raw = file.read_bytes()
        file.unlink()
        return raw

    return sent


def read_again(sent, method, **arguments):
    message = read(sent(method, **ABOUT, **arguments), NOW).message
    parse_command(message.task, message.arguments)
    return message.arguments


def test_importing_it_needs_no_settings_and_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE],
        env=clean_environment({}), cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(json.loads(done.stdout))
    assert "celery" in loaded
    assert not loaded & {
        "sqlalchemy", "psycopg", "alembic", "marshmallow", "requests", "flask", "structlog",
        "cryptography", "rich", "iso4217", "simplejson",
    }  # fmt: skip


def test_there_is_a_method_for_every_task_and_no_other():
    methods = {name for name, _ in inspect.getmembers(BillingClient, inspect.isfunction)}
    assert {f"billing.{name}" for name in methods if not name.startswith("_")} == set(TASKS)
    assert QUEUE == COMMANDS


@pytest.mark.parametrize("method", CALLS)
def test_what_a_method_sends_is_what_the_worker_reads(sent, method):
    envelope = read(sent(method, **CALLS[method]), NOW)
    message = envelope.message
    assert (message.task, message.faults) == (f"billing.{method}", ())
    # A question has no key: it may be asked again, and is answered anew.
    has_key = bool(parse_command(message.task, message.arguments).reference_id)
    assert has_key is (method != "describe")
    assert not envelope.wants_answer


def test_what_is_optional_is_sent_only_when_it_is_given(sent):
    plain = read(sent("subscribe", **CALLS["subscribe"]), NOW).message.arguments
    assert not {"ends_at", "catch_up", "dunning"} & set(plain)
    assert "ends_at" not in read_again(sent, "change_subscription", amount="12.00")


def test_an_agreed_end_and_policies_reach_the_worker(sent):
    given = {"ends_at": NOW.replace(year=2027), "catch_up": "collect_all:3", "dunning": "short"}
    message = read(sent("subscribe", **CALLS["subscribe"], **given), NOW).message
    record = parse_command(message.task, message.arguments).record
    assert record.ends_at == given["ends_at"]
    assert (str(record.state.catch_up), record.state.dunning) == ("collect_all:3", "short")


@pytest.mark.parametrize(
    ("given", "sent_as"), [(NOW, "2026-02-01T00:00:00+00:00"), ("", "")], ids=["given", "removed"]
)
@pytest.mark.parametrize("date", ["ends_at", "amount_from"])
def test_an_agreed_end_or_price_is_changed_or_removed(sent, given, sent_as, date):
    assert read_again(sent, "change_subscription", **{date: given})[date] == sent_as


@pytest.mark.parametrize(
    "method",
    [
        "change_subscription",
        "pause",
        "resume",
        "cancel",
        "uncancel",
        "end",
        "charge_once",
        "replace_card",
    ],
)
def test_the_time_of_a_decision_reaches_the_worker_and_is_absent_unless_given(sent, method):
    message = read(sent(method, **CALLS[method], decided_at=NOW), NOW).message
    assert parse_command(message.task, message.arguments).record.decided_at == NOW
    assert "decided_at" not in read(sent(method, **CALLS[method]), NOW).message.arguments


def test_a_card_token_is_in_the_body_alone_and_in_no_header(sent):
    message = json.loads(sent("subscribe", **CALLS["subscribe"]))
    assert CARD["token"].encode() in base64.b64decode(message.pop("body"))
    assert CARD["token"] not in json.dumps(message)


def test_a_datetime_without_a_zone_is_refused_before_it_is_sent(sent):
    with pytest.raises(ValueError, match="time zone"):
        sent("subscribe", **CALLS["subscribe"] | {"anchor_at": datetime(2026, 1, 1)})  # noqa: DTZ001


def test_a_question_about_two_things_is_refused_before_it_is_sent(sent):
    with pytest.raises(ValueError, match="exactly one"):
        sent("describe", invoice="sub-1-p0", customer="cust-1")
