"""Import and export of a book through the command line, on both databases."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from billing_worker.entrypoints.import_files import import_file as importing
from billing_worker.entrypoints.import_files.import_file import import_file
from billing_worker.persistence.rows import subscription_from
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import choose_policy
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.entrypoints.cli.test_commands import RECORD, imported, lines, run
from tests.support.world import KEY, START, World

__all__ = ["lines", "run"]  # fixtures

DAY = timedelta(days=1)

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
    assert but_the_book(exported(run, "--with-tokens")) == but_the_book(book)


def but_the_book(records):
    """Each record names the book that it was exported from."""
    return [record | {"from_book": None} for record in records]


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


@pytest.mark.parametrize(
    ("status", "exit_status"), [("cancelled", 0), ("ended", 0), ("suspended", 1), ("paused", 1)]
)
def test_what_no_record_can_say_is_left_out_of_an_export_with_status_1_unless_it_is_over(
    run, lines, database, status, exit_status
):
    imported(run, lines(RECORD))
    with database.transaction() as connection:
        # Paused without the time since when: a record could not tell how to go on.
        connection.execute(update(tables.subscriptions).values(status=status, next_billing_at=None))
    for format_ in ("jsonl", "csv"):
        result = run("subscriptions", "export", "--format", format_, status=exit_status)
        assert "sub-1" not in result.stdout
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
    monkeypatch.setattr(importing, "IMPORT_BATCH", 2)
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
    refused = pytest.raises(IntegrityError, match="nothing_due_before_paid_through")
    with refused, database.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(next_billing_at=early))


# --- a book that has been lived in ---------------------------------------------------------------


def the_same_as(world, tmp_path, sqlite_template):
    """Another database beside the same gateway, at the same time."""
    path = tmp_path / "elsewhere.db"
    shutil.copy(sqlite_template, path)
    other = World(Store(f"sqlite:///{path}"))
    other.clock, other.sandbox, other.transport = world.clock, world.sandbox, world.transport
    other.ports = other.ports_of_a_worker()
    return other


@pytest.fixture
def lived_in(store):
    """A world with one of each: what an operator or a command can make of a subscription."""
    world = World(store)
    week = {"interval": "week"}
    world.subscribe("approved", "plain")
    world.subscribe("approved", "changed", **week)
    world.subscribe("approved", "paused", **week)
    world.subscribe("approved", "shifted", **week, paid_through=(START - DAY).isoformat())
    world.subscribe("approved", "leaving")
    world.subscribe("approved", "policies", description="a, b", metadata={"ä": ['"', None]})
    world.subscribe("approved", "trialing", trial_end=(START + 60 * DAY).isoformat())
    world.subscribe("approved", "trial-paused", trial_end=(START + 20 * DAY).isoformat())
    world.subscribe("approved", "trial-shifted", trial_end=(START + 20 * DAY).isoformat())
    world.subscribe("approved", "few", ends_after_periods=5, **week)
    world.subscribe("approved", "used-up", ends_after_periods=1)
    world.subscribe("approved", "ends-early", **week, ends_at=(START + 20 * DAY).isoformat())
    world.subscribe("approved", "agreed-end", **week)
    world.subscribe(None, "cardless", anchor_at=(START + 30 * DAY).isoformat())
    moved_in = {"paid_through": (START + 30 * DAY).isoformat()}
    held = RECORD | {"reference_id": "held", "card": {"token": "approved"}} | moved_in
    subscribe(world.store, world.vault, world.clock, [parse_record(held)], by="test", held=True)
    world.tick()
    world.clock.advance(8 * DAY)
    world.tick()

    def do(what, reference, **options):
        getattr(lifecycle, what)(world.store, world.clock, reference, by="ann", **options)

    do("change", "changed", interval="month")
    do("change", "few", interval="day")
    for reference in ("paused", "shifted", "trial-paused", "trial-shifted"):
        do("pause", reference)
    do("cancel", "leaving", at_period_end=True)
    do("change", "policies", catch_up="collect_all:3")
    do("change", "held", catch_up="hold")
    do("change", "agreed-end", ends_at=(START + 30 * DAY).isoformat())
    choose_policy(
        world.store, world.clock,
        subscription_reference="policies", policy="short", by="ann", why="asked",
    )  # fmt: skip
    world.clock.advance(2 * DAY)
    world.tick()
    do("resume", "shifted", shift_anchor=True)
    do("resume", "trial-shifted", shift_anchor=True)
    assert world.discrepancies() == []  # not after the test: another database then charges, too
    return world


def agreements(world):
    """All subscriptions as the domain knows them, by reference, without ids of this database."""
    with world.store.reading() as connection:
        rows = connection.execute(select(tables.subscriptions)).all()
    return {
        row.reference_id: (
            replace(subscription_from(row), id=0, customer_id=0, card_id=None),
            row.held,
            row.metadata,
        )
        for row in rows
    }


def moved_to(other, book, path):
    path.write_text(book)
    report = import_file(path, other.store, other.vault, other.clock, by="test", dry_run=False)
    assert report.faults == []


@pytest.mark.parametrize("format_", ["jsonl", "csv"])
def test_a_book_that_has_been_lived_in_stands_the_same_after_export_and_import(
    lived_in, run, monkeypatch, tmp_path, sqlite_template, format_
):
    monkeypatch.setenv("BILLING_VAULT_KEYS", KEY)
    other = the_same_as(lived_in, tmp_path, sqlite_template)
    export = ("subscriptions", "export", "--with-tokens", "--format", format_)
    book = run(*export).stdout
    moved_to(other, book, tmp_path / f"book.{format_}")
    assert agreements(other) == agreements(lived_in)
    here = identity(lived_in)
    monkeypatch.setenv("BILLING_DATABASE_URL", f"sqlite:///{tmp_path}/elsewhere.db")
    assert run(*export).stdout.replace(identity(other), here) == book


def identity(world):
    with world.store.reading() as connection:
        return connection.execute(select(tables.book.c.identity)).scalar_one()


def test_a_lived_in_book_imported_into_itself_is_unchanged(lived_in, run, monkeypatch, tmp_path):
    monkeypatch.setenv("BILLING_VAULT_KEYS", KEY)
    before = agreements(lived_in)
    path = tmp_path / "book.jsonl"
    path.write_text(run("subscriptions", "export", "--with-tokens").stdout)
    report = import_file(
        path, lived_in.store, lived_in.vault, lived_in.clock, by="test", dry_run=False
    )
    assert (report.unchanged, report.faults) == (len(before), [])
    assert agreements(lived_in) == before


def test_no_reference_of_the_old_book_is_used_again_at_the_gateway_after_a_move(
    lived_in, run, monkeypatch, tmp_path, sqlite_template
):
    monkeypatch.setenv("BILLING_VAULT_KEYS", KEY)
    other = the_same_as(lived_in, tmp_path, sqlite_template)
    moved_to(other, run("subscriptions", "export", "--with-tokens").stdout, tmp_path / "b.jsonl")
    before = lived_in.debits()
    other.run_for(45 * DAY, step=DAY / 4)
    after = other.debits() - before
    assert set(after) & set(before) == set()
    assert set(after.values()) == {1}
    with other.store.reading() as connection:
        rows = connection.execute(select(tables.invoices)).all()
    assert {row.reference_id for row in rows if row.status == "paid"} == set(after)
    assert {"changed-p2", "few-p4", "shifted-p2", "trial-shifted-p0"} <= set(after)
    assert {"ends-early-p2", "agreed-end-p4"} <= set(after)
    assert not {"ends-early-p3", "agreed-end-p5"} & set(after)
    assert not [row for row in rows if row.reference_id.startswith(("held", "paused", "leaving"))]


def test_a_held_record_is_held_whatever_the_option_says(run, lines):
    imported(run, lines(RECORD | {"held": True}), 0, "--armed")
    [held] = listed(run)
    assert (held["held"], held["next_billing_at"]) == (True, None)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("catch_up", {"catch_up": "never"}),
        ("catch_up", {"catch_up": "collect_all"}),
        ("dunning", {"dunning": "gentle"}),
        ("held", {"held": "perhaps"}),
        ("first_number", {"first_number": -1}),
        ("paused_at", {"paused_at": "2026-02-30T00:00:00Z"}),
        ("ends_at", {"ends_at": "2026-01-31T00:00:00Z"}),
        ("ends_at", {"ends_at": "2026-03-01T00:00:00"}),
        ("ends_at", {"ends_at": "2026-05-31T00:00:00Z", "paid_through": "2026-05-30T00:00:00Z"}),
        ("cancels_at", {"cancels_at": "2026-02-28T00:00:00Z", "paused_at": "2026-02-01T00:00:00Z"}),
        ("metadata", {"metadata": {"a": "x" * 65_536}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["real", "dry"])
def test_a_choice_that_does_not_exist_is_refused_with_its_field_dry_or_not(
    run, lines, field, change, options
):
    report = imported(run, lines(RECORD | change), 1, *options)
    assert {fault["field"] for fault in report["faults"]} == {field}
    assert report["added"] == 0


def test_a_dry_run_tells_the_same_faults_as_the_import_that_follows(run, lines, monkeypatch):
    monkeypatch.setattr(importing, "IMPORT_BATCH", 2)
    imported(run, lines(BOOK[0], name="before.jsonl"))
    other_card = BOOK[2] | {"card": RECORD["card"] | {"token": "another-token-17"}}
    path = lines(
        *BOOK[:4],
        BOOK[0] | {"amount": "1.00"},
        "not json",
        BOOK[2] | {"amount": "2.00", "metadata": {"a": [2]}},
        other_card,
        BOOK[3],
        BOOK[3] | {"dunning": "gentle"},
        BOOK[3] | {"dunning": "short"},
        RECORD | {"reference_id": "mine", "card": {"token": "a-token-of-my-own"}},
        RECORD | {"reference_id": "sub-20", "anchor_at": "0026-01-31T00:00:00Z"},
        RECORD | {"reference_id": "sub-21"},
        RECORD | {"reference_id": "thief", "card": {"token": "a-token-of-my-own"},
                  "customer": {"reference_id": "cust-2"}},
    )  # fmt: skip
    dry = imported(run, path, 1, "--dry-run", "--held")
    real = imported(run, path, 1, "--held")
    assert dry == real
    assert {fault["line"] for fault in dry["faults"]} == {5, 6, 7, 8, 10, 11, 13, 15}
    assert "another-token-17" not in json.dumps(dry)


@pytest.mark.parametrize("depth", [40, 450, 985])
def test_metadata_of_any_depth_costs_its_own_line_only_in_json(run, lines, depth):
    deep = json.dumps(RECORD | {"reference_id": "deep"}).replace(
        '"metadata": {}', '"metadata": ' + '{"a":' * depth + "1" + "}" * depth
    )
    report = imported(run, lines(RECORD, deep, RECORD | {"reference_id": "sub-2"}), 1)
    assert [fault["line"] for fault in report["faults"]] == [2]
    assert [s["reference_id"] for s in listed(run)] == ["sub-1", "sub-2"]


def test_a_name_that_no_terminal_can_print_is_reported_like_any_other(run, lines):
    report = imported(run, lines(RECORD | {"\ud800na\0me": 1}), 1)
    [fault] = report["faults"]
    assert (fault["line"], fault["reason"]) == (1, "Unknown field.")
    assert "name" in fault["field"].replace("\N{REPLACEMENT CHARACTER}", "")


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


A_SECOND_LATE = RECORD | {"paid_through": "2026-04-30T00:00:01Z"}


def test_a_paid_through_that_just_misses_a_boundary_is_refused_with_the_dates_it_may_mean(
    run, lines
):
    path = lines(A_SECOND_LATE, RECORD | {"reference_id": "sub-2"})
    for options in (["--dry-run"], []):
        report = imported(run, path, 1, *options)
        assert (report["added"], report["near_boundary"]) == (1, 1)
        [fault] = report["faults"]
        assert (fault["line"], fault["field"]) == (1, "paid_through")
        for date in ("2026-04-30T00:00:00+00:00", "2026-05-31T00:00:00+00:00"):
            assert date in fault["reason"]
    assert "--snap-paid-through" in run("subscriptions", "import", path, status=1).stdout


def test_a_snapped_paid_through_lets_the_period_at_the_near_boundary_be_charged(run, lines):
    path = lines(A_SECOND_LATE)
    for _ in range(2):
        imported(run, path, 0, "--snap-paid-through")
    assert imported(run, path, 0, "--snap-paid-through")["unchanged"] == 1
    assert listed(run)[0]["next_billing_at"] == "2026-04-30T00:00:00+00:00"


@pytest.mark.parametrize(
    ("change", "first_charge"),
    [
        ({"paid_through": "2026-04-29T23:59:59Z"}, "2026-04-30"),  # both readings are the same
        ({"paid_through": "2026-05-01T00:00:00Z"}, "2026-05-31"),  # a whole day is no slip
        ({"paid_through": "2026-04-30T00:00:00Z"}, "2026-04-30"),
        ({"interval": "day", "paid_through": "2026-04-30T06:00:00Z"}, "2026-05-01"),  # a quarter
        ({"paid_through": "2026-01-30T12:00:00Z"}, "2026-01-31"),  # before the anchor
    ],
    ids=str,
)
def test_a_paid_through_that_means_one_date_is_taken_as_it_is(run, lines, change, first_charge):
    assert "near_boundary" not in imported(run, lines(RECORD | change), 0)
    assert listed(run)[0]["next_billing_at"].startswith(first_charge)


def test_a_dry_run_counts_what_is_due_at_once_and_what_is_centuries_away(run, lines):
    path = lines(
        RECORD,
        RECORD | {"reference_id": "sub-2", "anchor_at": "2206-01-31T00:00:00Z"},
        RECORD | {"reference_id": "sub-3", "ends_at": "2199-01-31T00:00:00Z"},
        RECORD | {"reference_id": "sub-4", "anchor_at": "2090-01-31T00:00:00Z"},
    )
    report = imported(run, path, 0, "--dry-run")
    assert (report["due_at_once"], report["after_2100"]) == (2, 2)
    told = run("subscriptions", "import", path, "--dry-run").stdout
    assert "2 would be due at once" in told
    assert "2 have a date after the year 2100" in told


def test_an_armed_import_of_held_ones_arms_nothing_and_says_how_to(run, lines):
    path = lines(*BOOK[:2])
    imported(run, path, 0, "--held")
    assert imported(run, path, 0, "--held")["unchanged"] == 2
    report = imported(run, path, 1, "--armed")
    assert (report["unchanged"], report["still_held"]) == (2, 2)
    assert listed(run)[0]["held"] is True
    told = run("subscriptions", "import", path, status=1).stderr
    assert "2 of them are held" in told
    assert "subscriptions activate" in told
    assert "HELD: 2 of them" in run("status").stdout
    run("subscriptions", "arm", "--all")
    assert "HELD" not in run("status").stdout
    assert imported(run, path, 0, "--armed")["unchanged"] == 2


@pytest.mark.parametrize("how", ["cancel", "end"])
def test_an_import_of_what_is_over_is_refused_and_asks_for_a_new_reference(run, lines, how):
    path = lines(*BOOK[:2])
    imported(run, path)
    run("subscriptions", how, "sub-1", "--by", "ann", *(["--now"] if how == "cancel" else []))
    for options in ([], ["--dry-run"]):
        report = imported(run, path, 1, *options)
        assert (report["unchanged"], report["bad_lines"]) == (1, 1)
        [fault] = report["faults"]
        assert (fault["line"], fault["field"]) == (1, "reference_id")
        assert "a new agreement needs a new one" in fault["reason"]


def test_an_import_of_what_is_about_to_be_cancelled_says_so(run, lines):
    path = lines(RECORD | {"anchor_at": "2099-01-31T00:00:00Z"})
    imported(run, path)
    run("subscriptions", "cancel", "sub-1", "--by", "ann", "--at-period-end")
    assert imported(run, path)["to_be_cancelled"] == 1
    assert "uncancel" in run("subscriptions", "import", path).stdout


def test_arm_wants_either_references_or_all(run):
    for wrong in ([], ["sub-1", "--all"]):
        assert "either references or --all" in run("subscriptions", "arm", *wrong, status=2).stderr


def test_a_held_subscription_cannot_be_due_whoever_says_so(run, lines, database):
    imported(run, lines(RECORD), 0, "--held")
    refused = pytest.raises(IntegrityError, match="held_is_not_billed")
    with refused, database.transaction() as connection:
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
