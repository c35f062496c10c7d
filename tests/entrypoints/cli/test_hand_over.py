"""A book that moves: each period is billed by one of the two, whatever dies in between."""

from __future__ import annotations

import json
from datetime import timedelta
from itertools import islice

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.import_files.import_file import import_file
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.subscriptions import activate_imports, lifecycle
from billing_worker.services.subscriptions import hand_over as service
from billing_worker.services.subscriptions.subscribe import FOREIGN
from tests.entrypoints.cli.test_commands import RECORD, run
from tests.entrypoints.import_files.test_import_export import the_same_as
from tests.support.books import name_book
from tests.support.world import KEY, World

__all__ = ["run"]  # a fixture

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
ORDER = {
    "reference_id": "extra-1", "customer": {"reference_id": "jo"}, "amount": "5.00",
    "currency": "USD", "card": {"token": "approved.jo"},
}  # fmt: skip

NEW = {"reference_id": "sub-new", "card": {"token": "approved.new"}}


@pytest.fixture
def world(store):
    """Not compared with the ledger afterwards: the other book charges there too."""
    return World(store)


@pytest.fixture
def other(world, tmp_path, sqlite_template):
    """Another book on the same account, whose clock is the same."""
    book = the_same_as(world, tmp_path, sqlite_template)
    with book.store.transaction() as connection:  # its database is a copy
        connection.execute(update(tables.book).values(identity="another", prefix="anothr-"))
    return book


@pytest.fixture
def cli(run, monkeypatch):
    monkeypatch.setenv("BILLING_VAULT_KEYS", KEY)
    return run


def handed_over(cli, *, status=0):
    options = ("--with-tokens", "--hand-over", "--why", "moves")
    return cli("subscriptions", "export", *options, status=status).stdout


def moved_to(other, book, tmp_path):
    path = tmp_path / "book.jsonl"
    path.write_text(book)
    report = import_file(path, other.store, other.vault, other.clock, by="test", dry_run=False)
    assert report.faults == []
    return report


def both(world, other, span, step=6 * HOUR):
    end = world.clock.now() + span
    while world.clock.now() < end:
        world.tick()
        other.tick()
        world.clock.advance(step)


def status(cli):
    return json.loads(cli("status", "--json").stdout)


def send(world, task, **arguments):
    return carry_out(world.ports, Message(f"billing.{task}", arguments)).as_json()


def of_all(world, table):
    with world.store.reading() as connection:
        return connection.execute(select(table).order_by(table.c.id)).all()


def test_the_old_book_bills_no_further_period_and_collects_what_is_open(
    world, other, cli, tmp_path
):
    world.subscribe("approved", "sub-1", interval="week")
    world.subscribe("decline_insufficient_funds", "sub-2", interval="week")
    world.tick()
    moved_to(other, handed_over(cli), tmp_path)
    give_card(world, "sub-2")
    both(world, other, 15 * DAY)
    assert world.fate("sub-2-p0") == "paid"
    assert other.fate("sub-1-p1") == "paid"
    assert set(world.debits(everybody=True).values()) == {1}
    assert {"sub-1-p0", "sub-1-p1", "sub-1-p2", "sub-2-p0"} <= set(world.debits(everybody=True))
    assert [row.reference_id for row in of_all(world, tables.invoices)] == ["sub-1-p0", "sub-2-p0"]


def give_card(world, reference):
    card = CardRecord(Secret(f"approved.{reference}"), None, None, None, None)
    replace_card(world.store, world.vault, world.clock, subscription_reference=reference,
                 card=card, by="ann", why=None)  # fmt: skip


def test_a_hand_over_that_was_broken_off_is_begun_again_and_writes_the_same(
    world, other, cli, tmp_path, monkeypatch
):
    monkeypatch.setattr(service, "HAND_OVER_BATCH", 2)
    for number in range(5):
        world.subscribe("approved", f"sub-{number}", interval="week")
    world.tick()
    lifecycle.pause(world.store, world.clock, "sub-1", by="ann")
    lifecycle.cancel(world.store, world.clock, "sub-2", at_period_end=True, by="ann")
    dying = service.hand_over(world.store, world.clock, by="ann", why="moves")
    assert len(list(islice(dying, 3))) == 3
    dying.close()
    held = [row.reference_id for row in of_all(world, tables.subscriptions) if row.handed_over_at]
    assert held == ["sub-0", "sub-1", "sub-2", "sub-3"], "held before it is written, page by page"
    world.clock.advance(HOUR)
    book = handed_over(cli)
    assert handed_over(cli) == book
    assert moved_to(other, book, tmp_path).added == 5
    both(world, other, 15 * DAY)
    assert set(world.debits(everybody=True).values()) == {1}
    assert not {"sub-1-p1", "sub-2-p1"} & set(world.debits(everybody=True))
    assert {"sub-0-p2", "sub-3-p2", "sub-4-p2"} <= set(world.debits(everybody=True))


def test_the_old_book_says_what_it_has_handed_over_and_what_stays(world, cli):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    handed_over(cli)
    said = status(cli)["handed_over"]
    assert (said["subscriptions"], said["open_invoices"]) == (1, 1)
    assert "1 open invoices of theirs are still collected here" in cli("status").stdout
    assert "another book bills the subscription since" in cli("explain", "sub-1-p0").stdout
    until = "2099-01-01T00:00:00Z"
    assert "handed over to another book" in cli("preview", "--until", until, "--csv").stdout


@pytest.mark.parametrize(
    ("what", "options"),
    [("change", {"amount": "1.00"}), ("pause", {}), ("cancel", {"at_period_end": False}),
     ("resume", {"shift_anchor": True}), ("uncancel", {})],
)  # fmt: skip
def test_no_decision_is_made_in_a_book_that_does_not_bill_it(world, cli, what, options):
    world.subscribe("approved")
    handed_over(cli)
    with pytest.raises(InvalidInput, match="handed over to another book"):
        getattr(lifecycle, what)(world.store, world.clock, "sub-1", by="ann", **options)


def test_what_is_open_of_a_paused_one_is_collected_here_once_it_is_ended_here(world, cli):
    world.subscribe("approved")
    world.transport.unreachable = True
    world.tick()
    world.transport.unreachable = False
    lifecycle.pause(world.store, world.clock, "sub-1", by="ann")
    handed_over(cli)
    lifecycle.end(world.store, world.clock, "sub-1", by="ann")
    world.run_for(HOUR)
    assert world.fate("sub-1-p0") == "paid"
    again = cli("subscriptions", "export", status=1)
    assert "1 ended since it was handed over" in again.stderr


def test_money_that_ends_a_suspension_here_starts_no_billing_here(world, cli):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    handed_over(cli)
    world.run_for(25 * DAY, step=6 * HOUR)
    assert of_all(world, tables.subscriptions)[0].status == "suspended"
    give_card(world, "sub-1")
    world.run_for(70 * DAY, step=DAY)
    assert world.debits(everybody=True) == {"sub-1-p0": 1}
    due = update(tables.subscriptions).values(next_billing_at=world.clock.now())
    refused = pytest.raises(IntegrityError, match="handed_over_is_not_billed")
    with refused, world.store.transaction() as connection:
        connection.execute(due)


def test_commands_that_the_old_book_has_carried_out_are_unchanged_in_the_new_one(
    world, other, cli, tmp_path
):
    assert send(world, "charge_once", **ORDER)["status"] == "done"
    over = RECORD | {"reference_id": "over", "card": {"token": "approved.over"}}
    assert send(world, "subscribe", **over)["status"] == "done"
    leaves = {"reference_id": "leave-1", "subscription": "over", "at_period_end": False}
    assert send(world, "cancel", **leaves)["status"] == "done"
    world.run_for(HOUR)
    before = world.debits(everybody=True)
    assert moved_to(other, handed_over(cli), tmp_path).done_commands == 3
    for task, asked in (("charge_once", ORDER), ("cancel", leaves)):
        assert send(other, task, **asked)["status"] == "unchanged"
        assert send(world, task, **asked)["status"] == "unchanged"
    assert send(world, "subscribe", **over)["status"] == "refused"  # it is over there
    again = send(other, "subscribe", **over)  # and not in this book, because it was over
    assert (again["status"], again["subscription"]["status"]) == ("unchanged", None)
    changed = send(other, "charge_once", **ORDER | {"amount": "6.00"})
    assert "was '5.00', is now '6.00'." in [error["reason"] for error in changed["errors"]]
    both(world, other, 2 * DAY)
    assert world.debits(everybody=True) == before


def test_nothing_new_begins_in_a_book_that_was_handed_over_until_it_is_taken_back(world, cli):
    world.subscribe("approved")
    handed_over(cli)
    for task, asked in (("charge_once", ORDER), ("subscribe", RECORD | NEW)):
        answer = send(world, task, **asked)
        assert answer["status"] == "refused"
        assert "handed over to another one" in answer["errors"][0]["reason"]
    back = ("subscriptions", "take-back", "--all", "--why", "stays", "--json")
    assert "--all needs either" in cli(*back, status=2).stderr
    assert cli(*back, "--unused").stdout
    assert send(world, "charge_once", **ORDER)["status"] == "done"
    world.run_for(32 * DAY, step=6 * HOUR)
    assert {"sub-1-p0", "sub-1-p1", "extra-1-p0"} == set(world.debits(everybody=True))


def test_what_is_held_since_its_import_is_not_armed_by_a_book_that_handed_it_over(
    world, other, cli, tmp_path
):
    cli("subscriptions", "import", str(write(tmp_path, RECORD | {"card": {"token": "approved"}})),
        "--held")  # fmt: skip
    moved_to(other, handed_over(cli), tmp_path)
    assert activate_imports.activate_all(world.store, world.clock, by="ann").armed == 0
    assert (
        activate_imports.arm(world.store, world.clock, [RECORD["reference_id"]], by="ann").armed
        == 0
    )
    assert activate_imports.activate_all(other.store, other.clock, by="ann").armed == 1
    cli("subscriptions", "take-back", RECORD["reference_id"], "--why", "stays")
    assert of_all(world, tables.subscriptions)[0].next_billing_at is None, "still held"
    refused = cli("subscriptions", "take-back", "nobody", "--why", "stays", status=1)
    assert "not handed over" in refused.stderr


def write(tmp_path, *records):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize("prefix", ["", "k2m4p6-"])
@pytest.mark.parametrize("token", ["approved", "approved_later", "answer_lost_after"])
def test_a_period_that_the_old_book_bills_all_the_same_is_found_by_the_new_one(
    world, other, cli, tmp_path, token, prefix
):
    name_book(world.store, prefix=prefix)
    world.subscribe(token, interval="week")
    world.tick()
    moved_to(other, cli("subscriptions", "export", "--with-tokens").stdout, tmp_path)
    world.run_for(8 * DAY, step=HOUR)
    assert world.debits(everybody=True)["sub-1-p1"] == 1
    other.run_for(5 * HOUR, step=HOUR / 4)
    assert other.fate("sub-1-p1") == "paid"
    assert world.debits(everybody=True)["sub-1-p1"] == 1


def test_only_the_first_period_after_a_move_is_polled_for(world, other, cli, tmp_path):
    world.subscribe("approved", interval="week")
    world.tick()
    moved_to(other, handed_over(cli), tmp_path)
    methods = []
    for _ in range(2):
        world.clock.advance(7 * DAY)
        world.transport.sent.clear()
        other.tick()
        methods.append([request.method for request in world.transport.sent])
    assert methods[0][0] == "GET"
    assert methods[1] == ["POST", "POST", "GET"]


def test_a_book_that_moved_twice_keeps_the_prefix_of_its_references(
    world, other, cli, tmp_path, monkeypatch
):
    world.subscribe("approved")
    first = json.loads(handed_over(cli))
    moved_to(other, json.dumps(first), tmp_path)
    monkeypatch.setenv("BILLING_DATABASE_URL", str(other.store.engine.url))
    second = json.loads(handed_over(cli))
    assert first["from_book"] != second["from_book"]
    assert first["from_prefix"] == second["from_prefix"]


@pytest.mark.parametrize("line", [
    {"task": "billing.start_checkout"}, {"task": "billing.pause", "digest": "x"},
    {"task": "billing.pause", "reference_id": ""}, 5, [],
])  # fmt: skip
def test_a_line_of_a_done_command_that_cannot_be_read_is_refused_by_field(other, tmp_path, line):
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"done_command": line}))
    report = import_file(path, other.store, other.vault, other.clock, by="test", dry_run=False)
    assert report.bad_lines == 1
    assert FOREIGN not in str(report.faults)


@pytest.mark.parametrize(
    "options",
    [("--hand-over",), ("--hand-over", "--with-tokens"),
     ("--hand-over", "--with-tokens", "--why", "x", "--format", "csv")],
)  # fmt: skip
def test_a_hand_over_wants_everything_that_the_other_book_needs(cli, options):
    assert "--hand-over needs" in cli("subscriptions", "export", *options, status=2).stderr
