"""Card numbers and card codes are refused at every door, and stay nowhere."""

from __future__ import annotations

import json
import random

import pytest
from click.testing import CliRunner

from billing_worker.domain.secret import holds_card_data
from billing_worker.entrypoints.cli import cli
from billing_worker.persistence.schema.columns import metadata
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.import_records.subscription import BadRecord, parse_record
from tests.entrypoints.cli.test_commands import RECORD
from tests.entrypoints.test_config import GOOD

PAN = "4111111111111111"
NUMBERS = (
    PAN, "4111 1111 1111 1111", "4111-1111-1111-1111", "3782 822463 10005", "5555555555554444",
    "2221000000000009", "6011111111111117", "30569309025904", "3530111333300000", "4222222222222",
    "6304000000000000", "2200000000000004", "paid with 4111111111111111, thanks",
)  # fmt: skip
CODES = ("cvv 123", "CVC: 1234", "csc=999", "cvv2 123")
NO_CARDS = (
    "1764547200000", "4111111111111112", "order 4000-1234", "9876543210987",
    "4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x", "f4111111111111111", "cv 123", "411111******1111",
    "550e8400-e29b-41d4-a716-446655440000",
)  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS + CODES)
def test_a_card_number_or_code_is_found(text):
    assert holds_card_data(text)


@pytest.mark.parametrize("text", NO_CARDS)
def test_something_else_is_not_taken_for_a_card(text):
    assert not holds_card_data(text)


def test_tokens_uuids_and_times_are_hardly_ever_taken_for_a_card():
    chance = random.Random(1)
    hexes = (f"{chance.getrandbits(256):064x}" for _ in range(20_000))
    times = (str(1_700_000_000_000 + chance.randrange(10**11)) for _ in range(20_000))
    uuids = (f"{u[:8]}-{u[8:12]}-{u[12:16]}-{u[16:20]}-{u[20:32]}" for u in hexes)
    assert not any(map(holds_card_data, [*times, *uuids]))


FIELDS = {
    "reference_id": PAN,
    "customer": {"reference_id": PAN},
    "customer name": {"customer": {"reference_id": "c", "name": f"Ann {PAN}"}},
    "token": {"card": {"token": PAN}},
    "mask": {"card": {"token": "t" * 20, "mask": PAN}},
    "description": "4111 1111 1111 1111",
    "metadata": {"note": [PAN]},
    "metadata name": {"metadata": {PAN: 1}},
    "metadata number": {"metadata": {"n": int(PAN)}},
    "metadata cvv": {"metadata": {"cvv": "123"}},
    "metadata cvv number": {"metadata": {"cvv": 123}},
}


def spoiled(place):
    value = FIELDS[place]
    return value if " " in place or place in {"token", "mask"} else {place: value}


@pytest.mark.parametrize("place", FIELDS)
def test_a_record_with_card_data_is_refused_without_repeating_it(place):
    with pytest.raises(BadRecord) as refused:
        parse_record(RECORD | spoiled(place))
    assert "must not hold a card number" in str(refused.value)
    assert PAN not in str(refused.value)


def everything_stored(world):
    with world.store.reading() as connection:
        return "".join(
            str(row)
            for table in metadata.sorted_tables
            for row in connection.execute(table.select())
        )


ABOUT = {"reference_id": "r-1", "subscription": "sub-1"}
COMMANDS = {
    "subscribe": RECORD,
    "charge_once": {
        "reference_id": "o-1", "customer": {"reference_id": "c"}, "card": {"token": "t" * 20},
        "amount": "5.00", "currency": "USD",
    },
    "replace_card": ABOUT | {"card": {"token": "t" * 20}},
    "start_tokenisation": {
        "reference_id": "t-1", "customer": {"reference_id": "c"}, "amount": "1.00",
        "currency": "USD",
    },
    "pause": ABOUT,
    "cancel": ABOUT | {"at_period_end": False},
}  # fmt: skip
SPOILED = (
    [("subscribe", one) for one in map(spoiled, FIELDS)]
    + [(task, {"reference_id": PAN}) for task in COMMANDS]
    + [(task, {"why": PAN}) for task in ("pause", "cancel")]
    + [(task, {"why": "his cvv 123"}) for task in ("pause", "cancel")]
    + [(task, {"by": PAN}) for task in ("pause", "cancel")]
    + [(task, {"card": {"token": PAN}}) for task in ("charge_once", "replace_card")]
    + [(task, {"description": PAN}) for task in ("charge_once", "start_tokenisation")]
    + [(task, {"metadata": {"a": {"b": PAN}}}) for task in ("start_tokenisation",)]
    + [("start_tokenisation", {"customer": {"reference_id": "c", "name": PAN}})]
)


@pytest.mark.parametrize(("task", "fields"), SPOILED, ids=str)
def test_a_command_with_card_data_is_refused_and_kept_without_it(world, task, fields):
    answer = carry_out(world.ports, Message(f"billing.{task}", COMMANDS[task] | fields, "m-1"))
    assert answer.as_json()["status"] == "refused"
    kept = everything_stored(world)
    assert "refused" in kept
    assert PAN not in kept + json.dumps(answer.as_json())
    assert "cvv 123" not in kept
    assert world.transport.sent == []


@pytest.fixture
def run(database_url, monkeypatch):
    for name, value in (GOOD | {"BILLING_DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)
    return lambda *arguments: CliRunner().invoke(cli, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("subscriptions", "pause", "sub-1", "--why", PAN),
        ("sales", "stop", "--reason", "4111 1111 1111 1111"),
        ("invoices", "mark-paid", "sub-1-p0", "--evidence", "cvv 123", "--why", "x"),
        ("customers", "update", "c", f"--name={PAN}"),
        ("webhooks", "add", "https://example.test/4111111111111111"),
    ],
)
def test_the_command_line_takes_no_card_data_in_any_argument(world, run, arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "an argument holds a card number or a CVV" in done.output
    assert PAN not in everything_stored(world) + done.output


@pytest.mark.parametrize("place", FIELDS)
def test_an_import_names_the_line_and_stores_and_prints_no_card_data(world, run, tmp_path, place):
    (tmp_path / "book.jsonl").write_text(json.dumps(RECORD | spoiled(place)))
    done = run("subscriptions", "import", str(tmp_path / "book.jsonl"))
    assert done.exit_code == 1
    assert "must not hold a card number" in done.output
    assert PAN not in everything_stored(world) + done.output
