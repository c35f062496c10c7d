"""Import and export of a book through the command line, on both databases."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from billing_worker.entrypoints import import_file as importing
from billing_worker.persistence import tables
from billing_worker.persistence.store import Store
from billing_worker.services.commands import Message, carry_out
from tests.entrypoints.test_commands import RECORD, imported, lines, run
from tests.support.world import World

__all__ = ["lines", "run"]  # fixtures

TOKEN = RECORD["card"]["token"]
BOOK = [
    RECORD,
    RECORD | {"reference_id": "sub-2", "amount": "1500", "currency": "JPY", "card": None},
    RECORD | {"reference_id": "sub-3", "trial_end": "2099-02-14T00:00:00Z", "metadata": {"a": [1]}},
    RECORD | {"reference_id": "sub-4", "paid_through": "2026-03-15T00:00:00Z"},
    RECORD | {"reference_id": "sub-5", "ends_after_periods": 1, "description": None,
              "paid_through": "2026-03-15T00:00:00Z"},
    RECORD | {"reference_id": "sub-6", "interval": "week", "interval_count": 2,
              "timezone": "Europe/Berlin", "anchor_at": "2026-01-31T12:34:56.789000Z"},
]  # fmt: skip


def listed(run):
    return json.loads(run("subscriptions", "list", "--json").stdout)


def exported(run, *options):
    out = run("subscriptions", "export", *options).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def database(database_url):
    with Store(database_url) as store:
        yield store


def test_an_export_imported_elsewhere_is_the_same_book(run, lines, monkeypatch, tmp_path):
    imported(run, lines(*BOOK))
    book = exported(run, "--with-tokens")
    before = listed(run)
    monkeypatch.setenv("BILLING_DATABASE_URL", f"sqlite:///{tmp_path}/elsewhere.db")
    run("migrate")
    assert imported(run, lines(*book, name="copy.jsonl"))["added"] == len(BOOK)
    assert listed(run) == before
    assert exported(run, "--with-tokens") == book


def test_an_export_imported_again_changes_nothing(run, lines):
    imported(run, lines(*BOOK))
    again = imported(run, lines(*exported(run, "--with-tokens"), name="again.jsonl"))
    assert (again["unchanged"], again["bad_lines"]) == (len(BOOK), 0)


def test_an_export_goes_on_where_the_book_stands(run, lines, database):
    imported(run, lines(RECORD))
    with database.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(
                next_period=3,
                next_billing_at=select(tables.subscriptions.c.anchor_at).scalar_subquery(),
            )
        )
    [record] = exported(run)
    assert record["anchor_at"] == "2026-01-31T00:00:00Z"
    assert record["paid_through"] == "2026-04-30T00:00:00Z"


def test_tokens_are_exported_only_on_request_and_a_book_without_them_is_refused(run, lines):
    imported(run, lines(*BOOK))
    book = exported(run)
    assert TOKEN not in json.dumps(book)
    report = imported(run, lines(*book, name="copy.jsonl"), 1)
    assert {fault["field"] for fault in report["faults"]} == {"card.token"}


@pytest.mark.parametrize("status", ["cancelled", "paused", "suspended", "ended"])
def test_what_must_not_be_billed_again_is_left_out_of_an_export(run, lines, database, status):
    imported(run, lines(RECORD))
    with database.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(status=status, next_billing_at=None))
    result = run("subscriptions", "export")
    assert result.stdout == ""
    assert f"left out: 1 {status}" in result.stderr


def test_a_conflict_shows_both_sides_of_what_differs_and_no_token(run, lines):
    imported(run, lines(RECORD))
    other = RECORD | {"amount": "10.99", "card": RECORD["card"] | {"token": "another-token-17"}}
    report = imported(run, lines(other | {"customer": {"reference_id": "cust-2"}}), 1)
    reasons = {fault["field"]: fault["reason"] for fault in report["faults"]}
    assert set(reasons) == {
        "reference_id", "customer.reference_id", "customer.name", "customer.email", "amount",
        "card.token",
    }  # fmt: skip
    assert reasons["amount"] == "stored '9.99', in the file '10.99'."
    assert TOKEN not in json.dumps(report)
    assert "another-token-17" not in json.dumps(report)


def test_a_dry_run_counts_and_sums_by_currency(run, lines):
    report = imported(run, lines(*BOOK), 0, "--dry-run")
    assert report["totals"] == {
        "JPY": {"count": 1, "amount": "1500"},
        "USD": {"count": 5, "amount": "49.95"},
    }


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_reference_twice_in_one_file_is_told_alike_by_dry_run_and_import(
    run, lines, monkeypatch, options
):
    monkeypatch.setattr(importing, "BATCH", 2)
    path = lines(*BOOK[:3], RECORD, RECORD | {"amount": "1.00"})
    report = imported(run, path, 1, *options)
    assert (report["added"], report["unchanged"], report["bad_lines"]) == (3, 1, 1)
    assert report["faults"][0]["line"] == 5


def test_a_line_longer_than_memory_allows_is_refused_and_the_next_one_is_read(run, lines):
    huge = json.dumps(RECORD | {"description": "x" * (importing.LONGEST_LINE * 2)})
    report = imported(run, lines(huge, RECORD), 1)
    assert (report["added"], report["faults"][0]["line"]) == (1, 1)


def test_a_csv_file_without_line_ends_is_refused(run, tmp_path):
    path = tmp_path / "book.csv"
    path.write_text("reference_id," + "x" * (importing.LONGEST_LINE * 2))
    assert "longer than" in imported(run, str(path), 1)["faults"][0]["reason"]


def test_nothing_is_due_before_the_imported_paid_through_whoever_says_so(run, lines, database):
    imported(run, lines(BOOK[3]))
    early = select(tables.subscriptions.c.anchor_at).scalar_subquery()
    with pytest.raises(IntegrityError), database.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(next_billing_at=early))


# --- held and armed ------------------------------------------------------------------------------


def test_a_held_book_is_not_billed_until_it_is_armed(run, lines):
    imported(run, lines(*BOOK), 0, "--held")
    assert {s["next_billing_at"] for s in listed(run)} == {None}
    assert [s["held"] for s in listed(run)].count(True) == 5  # sub-5 has nothing left to bill
    assert json.loads(run("subscriptions", "arm", "sub-4", "--json").stdout)["armed"] == 1
    assert json.loads(run("subscriptions", "arm", "--all", "--json").stdout)["armed"] == 4
    due = {s["reference_id"]: s["next_billing_at"] for s in listed(run)}
    assert due["sub-4"] == "2026-03-31T00:00:00+00:00"
    assert [reference for reference, at in due.items() if at is None] == ["sub-5"]


def test_arming_names_what_cannot_be_armed(run, lines):
    imported(run, lines(*BOOK[:2]), 0, "--held")
    run("subscriptions", "cancel", "sub-2", "--by", "ann", "--now")
    report = json.loads(
        run("subscriptions", "arm", "sub-1", "sub-2", "nobody", "--json", status=1).stdout
    )
    assert report["armed"] == 1
    assert set(report["refused"]) == {"sub-2", "nobody"}


def test_held_is_the_choice_of_the_first_import(run, lines):
    imported(run, lines(RECORD), 0, "--held")
    assert imported(run, lines(RECORD), 0, "--armed")["unchanged"] == 1
    assert listed(run)[0]["held"] is True


def test_arm_wants_either_references_or_all(run):
    run("subscriptions", "arm", status=2)
    run("subscriptions", "arm", "sub-1", "--all", status=2)


def test_a_held_subscription_cannot_be_due_whoever_says_so(run, lines, database):
    imported(run, lines(RECORD), 0, "--held")
    with pytest.raises(IntegrityError), database.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(next_billing_at=tables.subscriptions.c.anchor_at)
        )


# --- commands of other services ------------------------------------------------------------------


def test_commands_are_listed_newest_first_with_their_errors(run, database):
    world = World(database)
    carry_out(world.ports, Message("billing.subscribe", RECORD, "message-1"))
    carry_out(world.ports, Message("billing.pause", {"reference_id": "p-1"}, "message-2"))
    found = json.loads(run("commands", "--json").stdout)
    assert [command["outcome"] for command in found] == ["refused", "done"]
    assert found[0]["errors"] == [
        {"field": "subscription", "reason": "Missing data for required field."}
    ]
    assert TOKEN not in json.dumps(found)
    [refused] = json.loads(run("commands", "--not-done", "--json").stdout)
    [named] = json.loads(run("commands", "--reference", "p-1", "--json").stdout)
    [one] = json.loads(run("commands", "--message", "message-2", "--json").stdout)
    assert refused == named == one
    assert "Missing data" in run("commands").stdout
