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
from sqlalchemy import select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.cli import preview as command
from billing_worker.persistence import switches, tables
from billing_worker.services import adoption, catch_up, lifecycle
from billing_worker.services.cards import replace_card
from billing_worker.services.deviations import Comparison, compare
from billing_worker.services.preview import Totals, preview
from billing_worker.services.records import CardRecord, parse_record
from billing_worker.services.recover import choose_policy
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
    assert saved[1:-1] == printed["charges"]
    assert saved[-1] == {"lines": 3}
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
        (("--diff", __file__), 2),
    ],
)
def test_the_command_refuses_what_it_cannot_answer(run, arguments, status):
    run(*arguments, status=status)


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


# --- held until armed ------------------------------------------------------------------------


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
    adoption.arm_all(world.store, world.clock, by="ann")
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
    adoption.arm_all(world.store, world.clock, by="ann")
    world.run_for(29 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert (comparison.unexplained, len(deviations)) == (0, 2)
    assert {d.kind for d in deviations.values()} == {"charged"}
    assert all("subscription.armed by ann" in d.because for d in deviations.values())


# --- what else explains ----------------------------------------------------------------------


def test_a_card_that_was_given_explains_a_charge_that_had_none_and_no_other(world):
    for name in ("cardless", "paused"):
        world.subscribe(
            None if name == "cardless" else "approved",
            name,
            anchor_at=(START + 5 * DAY).isoformat(),
        )
    do(world, "pause", "paused")
    kept = Kept(world, 20 * DAY)
    world.clock.advance(DAY)
    for name in ("cardless", "paused"):
        card = CardRecord(Secret(f"approved.{name}"), None, None, 12, 2040)
        replace_card(
            world.store, world.vault, world.clock,
            subscription_reference=name, card=card, by="carl", why="new",
        )  # fmt: skip
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "paused")
            .values(status="active", paused_at=None, next_billing_at=START + 5 * DAY)
        )
    world.run_for(6 * DAY, step=DAY)
    deviations, comparison = kept.compared()
    assert "card.added by carl" in deviations["cardless-p0"].because
    assert deviations["paused-p0"].because is None
    assert comparison.unexplained == 1


def test_another_dunning_policy_is_a_change_that_explains_nothing_and_ends_no_comparison(world):
    world.subscribe("approved", anchor_at=(START + 5 * DAY).isoformat())
    kept = Kept(world, 20 * DAY)
    world.clock.advance(DAY)
    for policy in ("short", "slow"):
        choose_policy(
            world.store, world.clock,
            subscription_reference="sub-1", policy=policy, by="ann", why="vip",
        )  # fmt: skip
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(next_billing_at=START + 99 * DAY))
    world.clock.advance(10 * DAY)
    deviations, _ = kept.compared()
    assert deviations["sub-1-p0"].because is None


# --- a backlog that no single sweep opens ------------------------------------------------------


def long_overdue(world, days=1_100):
    """As if nobody had swept for years: an import would refuse it."""
    world.subscribe("approved", interval="day", anchor_at=(START - 10 * DAY).isoformat())
    with world.store.transaction() as connection:
        at = START - days * DAY
        connection.execute(update(tables.subscriptions).values(anchor_at=at, next_billing_at=at))


def test_more_periods_than_one_sweep_opens_are_foreseen_as_they_are_charged(world):
    long_overdue(world)
    lines = foreseen(world, timedelta(hours=1))
    assert len(lines) == 1_101
    planned = charges(lines)
    assert list(planned) == ["sub-1-p1100"]
    decided = list(catch_up.plan(world.store, world.clock.now(), catch_up.Answer()))
    assert [line.invoice for line in decided] == [line.invoice for line in lines]
    world.tick()
    world.tick()
    assert debited(world) == planned


def test_an_answer_is_complete_only_when_nothing_is_due_any_more(world):
    long_overdue(world)
    shown = list(catch_up.plan(world.store, world.clock.now(), catch_up.Answer()))
    done = catch_up.apply(
        world.store, world.clock, catch_up.Answer(), catch_up.Caps(), by="ann", why="outage"
    )
    assert (done.complete, done.lines) == (True, shown)
    with world.store.reading() as connection:
        [row] = connection.execute(select(tables.subscriptions)).all()
    assert row.next_billing_at > world.clock.now()


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
