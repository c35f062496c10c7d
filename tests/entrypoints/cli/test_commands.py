from __future__ import annotations

import csv
import json
from datetime import datetime

import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet, InvalidToken
from sqlalchemy import select

from billing_worker.entrypoints import cli as command_line
from billing_worker.entrypoints.cli import cli
from billing_worker.persistence.schema.tables import metadata
from tests.entrypoints.test_config import GOOD

RECORD = {
    "reference_id": "sub-1",
    "customer": {"reference_id": "cust-1", "name": "Jo Doe", "email": "jo@example.com"},
    "card": {"token": "4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x", "mask": "512381******0000",
             "brand": "mastercard", "expiry_month": 12, "expiry_year": 2032},
    "amount": "9.99", "currency": "USD", "interval": "month", "interval_count": 1,
    "anchor_at": "2026-01-31T00:00:00Z", "timezone": "UTC", "trial_end": None,
    "paid_through": None, "ends_after_periods": None, "description": "Pro plan", "metadata": {},
}  # fmt: skip


@pytest.fixture
def run(database_url, monkeypatch):
    for name, value in (GOOD | {"BILLING_DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)

    def run(*arguments, status=0):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result

    return run


@pytest.fixture
def lines(tmp_path):
    def write(*records, name="book.jsonl"):
        path = tmp_path / name
        path.write_text(
            "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n"
        )
        return str(path)

    return write


def imported(run, path, status=0, *options):
    return json.loads(
        run("subscriptions", "import", path, "--json", *options, status=status).stdout
    )


def test_the_documented_record_is_imported_and_shown(run, lines):
    assert imported(run, lines(RECORD))["added"] == 1
    shown = json.loads(run("subscriptions", "show", "sub-1", "--json").stdout)
    assert shown["next_billing_at"] == "2026-01-31T00:00:00+00:00"
    assert shown["amount"] == "9.99"
    assert shown["card"]["mask"] == "512381******0000"


def test_importing_the_same_file_again_changes_nothing(run, lines):
    path = lines(RECORD)
    imported(run, path)
    assert imported(run, path) == {"added": 0, "unchanged": 1, "bad_lines": 0, "faults": []}


def test_another_record_under_a_known_reference_is_a_conflict_and_changes_nothing(run, lines):
    imported(run, lines(RECORD))
    report = imported(run, lines(RECORD | {"amount": "10.99"}), 1)
    assert report["faults"][0]["field"] == "reference_id"
    shown = json.loads(run("subscriptions", "show", "sub-1", "--json").stdout)
    assert shown["amount"] == "9.99"


def test_a_bad_line_is_named_and_the_good_ones_are_imported(run, lines):
    path = lines(
        RECORD,
        "not json",
        RECORD | {"reference_id": "sub-2", "amount": "9.999"},
        RECORD | {"reference_id": "sub-3", "customer": {}},
        RECORD | {"reference_id": "sub-4"},
    )
    report = imported(run, path, 1)
    assert report["added"] == 2
    assert [(f["line"], f["field"]) for f in report["faults"]] == [
        (2, ""), (3, "amount"), (4, "customer.reference_id"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("amount", {"amount": 9.99}),
        ("amount", {"amount": "0"}),
        ("amount", {"amount": "-1"}),
        ("amount", {"amount": "1.5", "currency": "JPY"}),
        ("currency", {"currency": "XYZ"}),
        ("timezone", {"timezone": "Mars/Olympus"}),
        ("interval", {"interval": "fortnight"}),
        ("interval_count", {"interval_count": 0}),
        ("anchor_at", {"anchor_at": "2026-01-31T00:00:00"}),
        ("anchor_at", {"anchor_at": "yesterday"}),
        ("trial_end", {"trial_end": "2026-01-01T00:00:00Z"}),
        ("ends_after_periods", {"ends_after_periods": 0}),
        ("reference_id", {"reference_id": ""}),
        ("reference_id", {"reference_id": "x" * 101}),
        ("card.token", {"card": {"token": ""}}),
        ("card.expiry_month", {"card": {"token": "t", "expiry_month": 13}}),
        ("surprise", {"surprise": 1}),
    ],
    ids=str,
)
def test_a_record_that_breaks_a_rule_names_the_field(run, lines, field, change):
    report = imported(run, lines(RECORD | change), 1)
    assert field in {fault["field"] for fault in report["faults"]}
    assert report["added"] == 0


def test_a_dry_run_writes_nothing(run, lines):
    assert imported(run, lines(RECORD), 0, "--dry-run")["added"] == 1
    assert json.loads(run("subscriptions", "list", "--json").stdout) == []


def test_csv_means_the_same_as_json_lines(run, lines, tmp_path):
    path = tmp_path / "book.csv"
    flat = {
        "reference_id": "sub-1", "customer.reference_id": "cust-1", "customer.name": "Jo Doe",
        "customer.email": "jo@example.com", "card.token": RECORD["card"]["token"],
        "card.mask": "512381******0000", "card.brand": "mastercard", "card.expiry_month": "12",
        "card.expiry_year": "2032", "amount": "9.99", "currency": "USD", "interval": "month",
        "interval_count": "1", "anchor_at": "2026-01-31T00:00:00Z", "timezone": "UTC",
        "trial_end": "", "description": "Pro plan", "metadata": "{}",
    }  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, flat)
        writer.writeheader()
        writer.writerow(flat)
    assert imported(run, str(path))["added"] == 1
    assert imported(run, lines(RECORD))["unchanged"] == 1


def test_paid_through_moves_the_first_charge_and_keeps_the_anchor(run, lines):
    imported(run, lines(RECORD | {"paid_through": "2026-03-15T00:00:00Z"}))
    shown = json.loads(run("subscriptions", "show", "sub-1", "--json").stdout)
    assert shown["next_billing_at"] == "2026-03-31T00:00:00+00:00"
    assert shown["next_period"] == 2


def test_a_trial_end_becomes_the_anchor(run, lines):
    imported(run, lines(RECORD | {"trial_end": "2099-02-14T00:00:00Z"}))
    shown = json.loads(run("subscriptions", "show", "sub-1", "--json").stdout)
    assert shown["anchor_at"] == "2099-02-14T00:00:00+00:00"
    assert shown["status"] == "trialing"


def test_no_token_is_stored_in_clear_or_shown(run, lines, store):
    imported(run, lines(RECORD))
    shown = run("subscriptions", "show", "sub-1", "--json").output
    assert RECORD["card"]["token"] not in shown
    with store.reading() as connection:
        stored = {t.name: connection.execute(select(t)).all() for t in metadata.sorted_tables}
    assert len(stored["cards"]) == 1
    assert RECORD["card"]["token"] not in str(stored)


def test_an_unknown_reference_is_one_line_and_status_1(run):
    assert "no subscription 'x'" in run("subscriptions", "show", "x", status=1).output
    assert "no invoice" in run("explain", "x", status=1).output


def test_sales_are_stopped_and_started_with_a_reason_and_a_name(run):
    run("sales", "stop", "--reason", "incident 12", "--by", "ann")
    assert json.loads(run("status", "--json").stdout)["sales_on"] is False
    run("sales", "start", "--reason", "solved", "--by", "ann")
    status = json.loads(run("status", "--json").stdout)
    assert (status["sales_on"], status["restored_at"]) == (True, None)


def test_books_that_were_restored_are_known_from_the_start_of_sales_on(run):
    for action in ("stop", "start"):
        of_one = (action, "--service", "payment_card_usd_hpp")
        run("sales", *of_one, "--restored", "--reason", "x", status=2)
    run("sales", "stop", "--restored", "--reason", "backup of Monday")
    assert "BOOKS FROM A BACKUP: nothing becomes due" in run("status").stdout
    refused = run("sales", "start", "--reason", "who knows", status=1).output
    assert "start sales with --restored" in refused
    assert json.loads(run("status", "--json").stdout)["sales_on"] is False
    run("sales", "start", "--restored", "--reason", "backup of Monday")
    restored_at = json.loads(run("status", "--json").stdout)["restored_at"]
    assert datetime.fromisoformat(restored_at).tzinfo is not None
    assert f"BOOKS RESTORED: what was due by {restored_at}" in run("status").stdout


def test_a_new_key_is_a_fernet_key_that_nobody_else_has(run):
    ours, theirs = (Fernet(run("new-key").output.strip()) for _ in range(2))
    with pytest.raises(InvalidToken):
        theirs.decrypt(ours.encrypt(b"token"))


def test_an_unmigrated_database_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("BILLING_DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")
    result = CliRunner().invoke(cli, ["status"])
    assert result.exit_code == 1
    assert "run `billing-worker migrate`" in result.output


def test_an_unreachable_database_is_named_without_its_password(monkeypatch):
    monkeypatch.setattr("billing_worker.entrypoints.cli.shared._WAITS_SECONDS", (0.01,))
    monkeypatch.setenv("BILLING_DATABASE_URL", "postgresql://u:s3cret@127.0.0.1:1/billing")
    result = CliRunner().invoke(cli, ["status"])
    assert result.exit_code == 1
    assert "database unreachable: postgresql+psycopg://127.0.0.1: " in result.output
    assert "s3cret" not in result.output


def test_bad_settings_are_all_named_with_status_2(monkeypatch, capsys):
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as stop:
        command_line.main(args=["check"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert all(f"{name}: is missing." in printed for name in GOOD)


def test_check_tells_each_part_that_does_not_answer(run, monkeypatch):
    monkeypatch.setenv("BILLING_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("BILLING_GATEWAY_URL", "http://127.0.0.1:1/api")
    parts = {p["part"]: p["ok"] for p in json.loads(run("check", "--json", status=1).stdout)}
    assert (parts["database"], parts["redis"], parts["gateway"]) == (True, False, False)


def test_a_folder_that_cannot_be_made_is_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(args=["up", "--folder", "/proc/nope"])
    assert stop.value.code == 1
    assert "/proc/nope" in capsys.readouterr().err
