"""The command `preview`, and what it says of imports that are held."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.cli import preview as command
from billing_worker.persistence.schema import tables
from billing_worker.services.forecast.line import Totals
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions import activate_imports
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.entrypoints.test_config import GOOD
from tests.support.forecast import DAY, Kept, charges, debited, do, foreseen, reasons
from tests.support.world import START


@pytest.fixture
def run(world, database_url, monkeypatch):
    for name, value in (GOOD | {"BILLING_DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)

    class Clock:
        def now(self):
            return world.clock.now()

    monkeypatch.setattr(command, "SystemClock", Clock)

    def run(*arguments, status=0):
        result = CliRunner().invoke(cli, ["preview", *arguments], catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result

    return run


@pytest.mark.by_hand
def test_the_command_prints_the_same_as_json_csv_and_file_and_compares_it_later(
    world, run, tmp_path
):
    world.subscribe("approved", interval="week", description="Ünïcode")
    world.subscribe(None, "cardless")
    until, file = (START + 8 * DAY).isoformat(), str(tmp_path / "preview.jsonl")
    printed = json.loads(run("--until", until, "--json", "--save", file).stdout)
    rows = list(csv.DictReader(io.StringIO(run("--until", until, "--csv").stdout)))
    saved = [json.loads(line) for line in (tmp_path / "preview.jsonl").read_text().splitlines()]
    assert [c["invoice"] for c in printed["charges"]] == [r["invoice"] for r in rows]
    assert saved[1:-1] == printed["charges"]
    assert saved[-1] == {"lines": 3, "read_by": START.isoformat()}
    assert printed["totals"]["charged"] == [{"currency": "USD", "count": 2, "amount": "19.98"}]
    assert "19.98" in run("--until", until).stdout
    world.run_for(9 * DAY, step=DAY / 2)
    compared = json.loads(run("--diff", file, "--json").stdout)
    assert (compared["deviations"], compared["unexplained"]) == ([], 0)
    assert compared["counts"]["as_planned"] == 3
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(next_period=9))
        connection.execute(
            update(tables.invoices)
            .where(tables.invoices.c.period_number == 1)
            .values(amount_minor=1)
        )
    assert "UNEXPLAINED" in run("--diff", file, status=1).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        ((), 2, "give either --until TIME or --diff FILE"),
        (("--until", "tomorrow"), 2, "must be an ISO 8601 date and time"),
        (("--until", "2026-03-01T00:00:00"), 2, "needs a UTC offset"),
        (("--until", "2020-01-01T00:00:00Z"), 1, "has passed"),
        (("--diff", __file__), 2, "no saved preview"),
    ],
)
def test_the_command_refuses_what_it_cannot_answer_and_says_why(run, arguments, status, why):
    assert why in run(*arguments, status=status).stderr


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 100, -1])
def test_a_saved_preview_that_was_cut_off_is_compared_with_nothing(world, run, tmp_path, kept):
    """`kept` lines, or some of the bytes."""
    world.subscribe("approved", interval="week")
    path = tmp_path / "preview.jsonl"
    run("--until", (START + 15 * DAY).isoformat(), "--save", str(path))
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    whole = b"".join(lines)
    path.write_bytes({100: whole[:400], -1: whole[:-4]}.get(kept, b"".join(lines[:kept])))
    output = run("--diff", str(path), "--json", status=2).output
    assert "cut off" in output or "no saved preview" in output
    assert "deviations" not in output


def held(world, reference, **fields):
    record = {
        "reference_id": reference, "customer": {"reference_id": "mover"},
        "card": {"token": "approved"}, "amount": "9.99", "currency": "USD", "interval": "month",
        "anchor_at": (START - 100 * DAY).isoformat(),
    }  # fmt: skip
    parsed = parse_record(record | fields)
    subscribe(world.store, world.vault, world.clock, [parsed], by="test", held=True)


def test_a_held_book_is_foreseen_as_it_is_charged_once_it_is_armed(world):
    held(world, "late", catch_up="collect_all:4")
    held(world, "weekly", interval="week", paid_through=(START - 3 * DAY).isoformat())
    held(world, "forgetful", anchor_at=(START - 33 * DAY).isoformat())
    held(world, "cardless", card=None)
    world.subscribe("approved", "live", interval="week")
    before = foreseen(world)
    assert {line.reason for line in before if line.subscription != "live"} == {
        "held since its import"
    }
    if_armed = {line.invoice: line.at for line in before if line.if_armed == "charged"}
    activate_imports.activate_all(world.store, world.clock, by="ann")
    after = foreseen(world)
    assert charges(after) == charges(before) | if_armed
    assert reasons(after) == {
        line.invoice: line.if_armed for line in before if line.if_armed not in {None, "charged"}
    }
    assert any("waived" in reason for reason in reasons(after).values())
    totals, armed = Totals(), Totals()
    for line in before:
        totals.add(line)
    for line in after:
        if line.subscription != "live":
            armed.add(line)
    assert totals.as_dict()["if_armed"] == armed.as_dict()
    for moment in sorted(set(charges(after).values())):
        world.clock.advance(moment - world.clock.now())
        world.tick()
    assert debited(world) == charges(after)


def test_what_is_held_and_over_is_not_foreseen_even_if_armed(world):
    held(world, "left")
    do(world, "cancel", "left", at_period_end=False)
    assert {(line.reason, line.if_armed) for line in foreseen(world)} == {
        ("subscription is cancelled", None)
    }


def test_the_command_shows_what_arming_will_charge(world, run):
    held(world, "late")
    until = (START + 31 * DAY).isoformat()
    totals = json.loads(run("--until", until, "--json").stdout)["totals"]
    assert totals["charged"] == []
    assert totals["if_armed"]["charged"] == [{"currency": "USD", "count": 2, "amount": "19.98"}]
    assert "Charges if armed" in run("--until", until).stdout


def test_arming_explains_the_charges_of_what_was_held(world):
    held(world, "mover", paid_through=(START - 10 * DAY).isoformat())
    kept = Kept(world)
    world.clock.advance(DAY)
    activate_imports.activate_all(world.store, world.clock, by="ann")
    world.run_for(29 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert (comparison.unexplained, len(deviations)) == (0, 2)
    assert {d.kind for d in deviations.values()} == {"charged"}
    assert all("subscription.armed by ann" in d.because for d in deviations.values())
