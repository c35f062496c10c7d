"""What is foreseen, and what is said about it afterwards, on both databases."""

from __future__ import annotations

import csv
import io
import json
import time
from datetime import timedelta
from decimal import Decimal

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.cli import preview as command
from billing_worker.persistence import switches, tables
from billing_worker.services import lifecycle
from billing_worker.services.deviations import Comparison, compare
from billing_worker.services.preview import Totals, preview
from billing_worker.services.records import parse_record
from billing_worker.services.subscribe import subscribe
from tests.entrypoints.test_config import GOOD
from tests.support.world import START

DAY = timedelta(days=1)
ANN = {"by": "operator:ann", "why": "asked by phone"}


def do(world, what, reference="sub-1", **options):
    return getattr(lifecycle, what)(world.store, world.clock, reference, **(ANN | options))


def foreseen(world, until=31 * DAY):
    return list(preview(world.store, world.clock.now(), world.clock.now() + until))


def charges(lines):
    return {line.invoice: line.at for line in lines if line.reason is None}


def reasons(lines):
    return {line.invoice: line.reason for line in lines if line.reason is not None}


def debited(world):
    return {d.reference_id.rpartition("-a")[0]: d.at for d in world.sandbox.ledger}


class Kept:
    """A preview that was saved, to be compared later."""

    def __init__(self, world, until=31 * DAY):
        self._world = world
        self.made_at, self.until = world.clock.now(), world.clock.now() + until
        self.lines = [json.loads(json.dumps(line.as_dict())) for line in foreseen(world, until)]

    def compared(self):
        comparison = Comparison()
        now = self._world.clock.now()
        found = compare(self._world.store, now, self.made_at, self.until, self.lines, comparison)
        return {d.invoice: d for d in found}, comparison


# --- before ----------------------------------------------------------------------------------


def test_every_charge_until_the_date_and_no_other_is_foreseen(world):
    world.subscribe("approved", "weekly", interval="week")
    world.subscribe("approved", "monthly")
    lines = foreseen(world, 28 * DAY)
    assert [line.invoice for line in lines] == [
        "weekly-p0", "weekly-p1", "weekly-p2", "weekly-p3", "weekly-p4", "monthly-p0", "monthly-p1",
    ]  # fmt: skip
    assert charges(lines)["monthly-p1"] == START + 28 * DAY


def test_what_was_foreseen_is_what_is_debited_to_the_minute(world):
    world.subscribe("approved", "weekly", interval="week")
    world.subscribe("approved", "ends", interval="day", ends_after_periods=3)
    world.subscribe("approved", "late", anchor_at=(START - 45 * DAY).isoformat())
    do(world, "change", "late", catch_up="collect_all:4")  # now opened, on its old policy
    world.subscribe("approved", "later", anchor_at=(START - 45 * DAY).isoformat())
    planned = charges(foreseen(world))
    for moment in sorted(set(planned.values())):
        world.clock.advance(moment - world.clock.now())
        world.tick()
    world.clock.advance(START + 31 * DAY - world.clock.now())
    world.tick()
    assert debited(world) == planned


def test_each_reason_why_nothing_is_charged_is_told(world):
    for name in ("paused", "cancelled", "leaving", "ended", "kept", "held"):
        world.subscribe("approved", name, anchor_at=(START + DAY).isoformat())
    world.subscribe(None, "cardless", anchor_at=(START + DAY).isoformat())
    do(world, "pause", "paused")
    do(world, "cancel", "cancelled", at_period_end=False)
    do(world, "cancel", "leaving", at_period_end=True)
    do(world, "end", "ended")
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "held")
            .values(held=True, next_billing_at=None)
        )
    world.subscribe("approved", "expiring", anchor_at=(START + DAY).isoformat(),
                    card={"token": "approved", "expiry_month": 1, "expiry_year": 2026})  # fmt: skip
    lines = foreseen(world, 28 * DAY)
    assert list(charges(lines)) == ["kept-p0"]
    assert reasons(lines) == {
        "paused-p0": "subscription is paused",
        "cancelled-p0": "subscription is cancelled",
        "leaving-p0": "cancelled by then",
        "ended-p0": "all its periods have been billed",
        "held-p0": "held since its import",
        "cardless-p0": "no card",
        "expiring-p0": "card_expired",
    }


def test_open_invoices_are_foreseen_with_their_next_step_or_their_reason(world):
    world.subscribe("answer_lost_after", "unknown")
    world.subscribe("rejects_token", "refused")
    world.tick()
    told = reasons(foreseen(world, DAY))
    assert told["unknown-p0"].startswith("in flight")
    assert told["refused-p0"].startswith("held: not_charged: gateway refused")


def test_while_sales_are_off_nothing_is_foreseen_to_be_charged(world):
    world.subscribe("approved")
    with world.store.transaction() as connection:
        switches.turn_sales(connection, on=False, by="ann", reason="audit", now=START)
    assert set(reasons(foreseen(world)).values()) == {"sales are switched off"}


def test_the_past_is_refused(world):
    with pytest.raises(InvalidInput, match="until"):
        foreseen(world, -DAY)


def test_totals_are_exact_by_currency_and_count_the_reasons(world):
    for number, (amount, currency) in enumerate(
        [("0.10", "USD"), ("0.20", "USD"), ("5", "JPY"), ("0.001", "KWD")]
    ):
        world.subscribe("approved", f"sub-{number}", amount=amount, currency=currency)
    world.subscribe(None, "cardless")
    totals = Totals()
    for line in foreseen(world, DAY):
        totals.add(line)
    sums = {s["currency"]: (s["count"], Decimal(s["amount"])) for s in totals.as_dict()["charged"]}
    assert sums == {
        "JPY": (1, Decimal(5)),
        "KWD": (1, Decimal("0.001")),
        "USD": (2, Decimal("0.30")),
    }
    assert totals.as_dict()["not_charged"] == {"no card": 1}


# --- afterwards ------------------------------------------------------------------------------


def test_a_month_as_foreseen_has_no_deviation(world):
    for number in range(3):
        world.subscribe("approved", f"sub-{number}", interval="week")
    kept = Kept(world)
    world.run_for(31 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert deviations == {}
    assert comparison.counts == {"as_planned": 15}


def test_before_its_time_a_planned_charge_is_not_a_deviation(world):
    world.subscribe("approved", interval="week")
    kept = Kept(world)
    world.tick()
    deviations, comparison = kept.compared()
    assert deviations == {}
    assert comparison.counts == {"as_planned": 1, "not_due_yet": 4}


def test_every_deviation_of_an_eventful_month_is_explained(world):
    cards = {"declines": "decline_card_expired", "unknown": "never_answers_after"}
    names = ("cancels", "pauses", "changes", "resumes", "ends", "faster", *cards)
    for name in names:
        world.subscribe(cards.get(name, "approved"), name, interval="week",
                        anchor_at=(START + DAY).isoformat())  # fmt: skip
    do(world, "pause", "resumes")
    kept = Kept(world)
    world.clock.advance(timedelta(hours=12))
    do(world, "cancel", "cancels", at_period_end=False)
    do(world, "pause", "pauses")
    do(world, "resume", "resumes", shift_anchor=False)
    do(world, "change", "changes", amount="1.00")
    do(world, "change", "faster", interval="day")
    do(world, "end", "ends")
    world.subscribe("approved", "newcomer")
    world.run_for(3 * DAY, step=timedelta(hours=6))
    deviations, comparison = kept.compared()
    assert comparison.unexplained == 0
    kinds = {invoice: deviation.kind for invoice, deviation in deviations.items()}
    assert kinds["cancels-p0"] == kinds["pauses-p0"] == kinds["ends-p0"] == "not_due"
    assert kinds["changes-p0"] == "changed"
    assert kinds["resumes-p0"] == "charged"
    assert kinds["declines-p0"] == "open"
    assert kinds["faster-p1"] == "moved"
    assert kinds["newcomer-p0"] == "unforeseen"
    assert "subscription.cancelled by operator:ann" in deviations["cancels-p0"].because
    assert "asked by phone" in deviations["changes-p0"].because
    assert "card_expired" in deviations["declines-p0"].because
    assert deviations["newcomer-p0"].because.startswith("subscribed after")


def test_a_charge_in_flight_is_unknown_and_says_so(world):
    world.subscribe("needs_3ds")
    kept = Kept(world, DAY)
    world.tick()
    deviations, comparison = kept.compared()
    assert (deviations["sub-1-p0"].kind, comparison.unexplained) == ("unknown", 0)


def test_what_nobody_decided_is_unexplained(world):
    for name in ("never-opened", "never-charged", "other-amount", "uninvited"):
        world.subscribe("approved", name)
    do(world, "pause", "uninvited")
    kept = Kept(world, DAY)
    with world.store.transaction() as connection:
        moved = update(tables.subscriptions).where(
            tables.subscriptions.c.reference_id == "never-opened"
        )
        connection.execute(moved.values(next_billing_at=START + 40 * DAY))
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "other-amount")
            .values(amount_minor=1)
        )
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "uninvited")
            .values(status="active", paused_at=None)
        )
        connection.execute(
            update(tables.invoices)
            .where(tables.invoices.c.reference_id == "uninvited-p0")
            .values(next_attempt_at=START, ring_at=START)
        )
    world.tick()
    with world.store.transaction() as connection:
        world_forgets = update(tables.invoices).where(
            tables.invoices.c.reference_id == "never-charged-p0"
        )
        connection.execute(world_forgets.values(status="open", paid_at=None, next_attempt_at=START))
    world.clock.advance(timedelta(hours=2))
    deviations, comparison = kept.compared()
    unexplained = {d.invoice for d in deviations.values() if d.because is None}
    assert unexplained == {
        "never-opened-p0", "never-charged-p0", "other-amount-p0", "uninvited-p0",
    }  # fmt: skip
    assert comparison.unexplained == 4
    with world.store.transaction() as connection:  # as the ledger knows it
        connection.execute(world_forgets.values(status="paid", paid_at=START, next_attempt_at=None))


# --- the command -----------------------------------------------------------------------------


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
    assert saved[1:] == printed["charges"]
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
    ("arguments", "status"),
    [
        ((), 2),
        (("--until", "tomorrow"), 2),
        (("--until", "2026-03-01T00:00:00"), 2),
        (("--until", "2020-01-01T00:00:00Z"), 1),
        (("--diff", __file__), 1),
    ],
)
def test_the_command_refuses_what_it_cannot_answer(run, arguments, status):
    run(*arguments, status=status)


# --- how fast --------------------------------------------------------------------------------


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_100000_subscriptions_for_31_days_in_under_20_seconds(world):
    """Prints its figures; the promise is asserted."""
    for start in range(0, 100_000, 5_000):
        records = [
            parse_record(
                {
                    "reference_id": f"sub-{n}",
                    "customer": {"reference_id": f"customer-{n - n % 2}"},
                    "card": {"token": "approved"},
                    "amount": "9.99",
                    "currency": "USD",
                    "interval": ("month", "week")[n % 10 == 0],
                    "anchor_at": (START + timedelta(minutes=n % 40_000)).isoformat(),
                    "timezone": ("UTC", "Europe/Berlin", "America/New_York")[n % 3],
                }
            )
            for n in range(start, start + 5_000)
        ]
        subscribe(world.store, world.vault, world.clock, records, by="benchmark")
    started, cpu_started = time.monotonic(), time.process_time()
    totals = Totals()
    for line in preview(world.store, world.clock.now(), world.clock.now() + 31 * DAY):
        totals.add(line)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu_started
    name = "sqlite" if world.store.is_sqlite else "postgresql"
    print(f"\npreview of 100,000 subscriptions on {name}: {seconds:.1f} s, {cpu:.1f} s CPU")
    print(f"  {totals.as_dict()}")
    assert cpu < 20  # not the wall clock's: the machine may be shared
