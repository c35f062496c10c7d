"""What is foreseen, and what is said about it afterwards, on both databases."""

from __future__ import annotations

import csv
import io
import json
from datetime import timedelta
from decimal import Decimal

import pytest
from click.testing import CliRunner
from sqlalchemy import select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.cli import preview as command
from billing_worker.persistence import forecast, switches
from billing_worker.persistence.schema import tables
from billing_worker.services import kill_switch
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.dunning import choose_policy, retry_invoice
from billing_worker.services.forecast.line import Totals
from billing_worker.services.forecast.preview import preview
from billing_worker.services.forecast.variance import Comparison, compare
from billing_worker.services.hosted_pages.start import start_checkout
from billing_worker.services.import_records.subscription import CardRecord, parse_record
from billing_worker.services.invoicing import catch_up
from billing_worker.services.operators.debts import mark_paid
from billing_worker.services.subscriptions import activate_imports, lifecycle
from billing_worker.services.subscriptions.subscribe import subscribe
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
        found = compare(
            self._world.store, now, self.made_at, self.made_at, self.until, self.lines, comparison
        )
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
            .values(next_attempt_at=START, enqueue_at=START)
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


# --- what was opened and never charged ---------------------------------------------------------


def nobody_charges_for(world, days):
    """Every worker is dead; the beat still opens what becomes due."""
    for _ in range(days):
        world.sweep()
        world.bell.messages.clear()
        world.clock.advance(DAY)


def run_through(world, planned, until):
    for moment in sorted({*planned.values(), until}):
        world.clock.advance(moment - world.clock.now())
        world.tick()


def rows(world, table=tables.invoices):
    with world.store.reading() as connection:
        return {row.reference_id: row for row in connection.execute(select(table))}


def test_first_charges_that_were_missed_are_foreseen_as_they_are_decided_again(world):
    busy = {"customer": {"reference_id": "busy"}, "card": {"token": "approved.busy"}}
    for policy in ("collect_latest", "collect_all:3", "hold", "forgive_older_than:2"):
        world.subscribe("approved", policy.partition(":")[0], interval="day", catch_up=policy,
                        ends_after_periods=8, **busy)  # fmt: skip
    world.subscribe("approved", "monthly", **busy)
    world.subscribe("approved", "alone", interval="week", catch_up="collect_all:9")
    nobody_charges_for(world, 5)
    kept = Kept(world, 40 * DAY)
    lines = foreseen(world, 40 * DAY)
    planned = charges(lines)
    assert len(set(planned.values())) > 5
    run_through(world, planned, kept.until)
    assert debited(world) == planned
    books = rows(world)
    told = {name: reason for name, reason in reasons(lines).items() if name in books}
    assert told == {name: books[name].reason for name in told}
    words = " ".join(told.values())
    assert "collect_latest" in words
    assert "hold" in words
    assert "older than 2 days" in words
    assert kept.compared()[0] == {}


def test_missed_first_charges_are_foreseen_from_when_the_first_of_them_is_rung_for(world):
    world.subscribe("approved", interval="day", ends_after_periods=3)
    nobody_charges_for(world, 3)
    with world.store.transaction() as connection:
        number = tables.invoices.c.period_number
        for period, hours in enumerate((3, 2, 5)):
            rung = world.clock.now() + timedelta(hours=hours)
            connection.execute(
                update(tables.invoices).where(number == period).values(enqueue_at=rung)
            )
    planned = charges(foreseen(world))
    assert planned == {"sub-1-p2": world.clock.now() + timedelta(hours=2)}
    run_through(world, planned, world.clock.now() + DAY)
    assert debited(world) == planned


def test_missed_first_charges_that_cannot_be_planned_anew_are_foreseen_as_held(world, monkeypatch):
    world.subscribe("approved", interval="day")
    nobody_charges_for(world, 2)

    def broken(*_, **__):
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr("billing_worker.domain.catch_up.plan_missed", broken)
    told = reasons(foreseen(world, timedelta(hours=1)))
    assert told["sub-1-p0"] == "catch_up.trouble: ZeroDivisionError: our bug"
    world.tick()
    assert rows(world)["sub-1-p0"].reason == told["sub-1-p0"]


def test_what_was_missed_is_not_foreseen_as_charged_while_sales_are_off(world):
    world.subscribe("approved", interval="day")
    nobody_charges_for(world, 3)
    kill_switch.switch(world.store, on=False, service=None, by="operator:ann", reason="audit",
                 now=world.clock.now())  # fmt: skip
    assert set(reasons(foreseen(world)).values()) == {"sales are switched off"}


def test_open_invoices_are_foreseen_as_void_once_a_cancellation_is_due(world):
    world.subscribe("approved", interval="day")
    nobody_charges_for(world, 1)
    world.clock.advance(-timedelta(hours=2))
    do(world, "cancel", "sub-1", at_period_end=True)
    world.clock.advance(timedelta(hours=3))
    told = reasons(foreseen(world))
    assert told["sub-1-p0"] == "subscription is cancelled"
    world.tick()
    assert rows(world)["sub-1-p0"].status == "void"


def test_late_debits_are_not_foreseen_after_the_cancellation_that_voids_them(world):
    for name in ("gone", "leaving"):
        world.subscribe("approved", name, interval="week", catch_up="collect_all:9",
                        anchor_at=(START + DAY).isoformat())  # fmt: skip
    do(world, "cancel", "gone", at_period_end=True)
    with world.store.transaction() as connection:
        name = tables.subscriptions.c.reference_id
        for reference, days in (("gone", 10), ("leaving", 30)):
            connection.execute(
                update(tables.subscriptions)
                .where(name == reference)
                .values(cancels_at=START + days * DAY)
            )
    world.clock.advance(16 * DAY)
    kept = Kept(world)
    told = reasons(foreseen(world))
    assert told["gone-p0"] == told["gone-p1"] == "subscription is cancelled"
    assert told["leaving-p2"] == "cancelled by then"
    planned = charges(foreseen(world))
    run_through(world, planned, kept.until)
    assert debited(world) == planned
    assert kept.compared()[0] == {}


def test_what_waits_for_an_older_invoice_is_not_foreseen_and_explained_once_that_is_paid(world):
    world.subscribe("decline_insufficient_funds", interval="day", ends_after_periods=3)
    world.tick()
    world.clock.advance(DAY)
    world.tick()
    kept = Kept(world, 20 * DAY)
    assert reasons(foreseen(world))["sub-1-p1"] == "an older invoice comes first"
    card = CardRecord(Secret("approved.new"), None, None, 12, 2040)
    replace_card(
        world.store, world.vault, world.clock,
        subscription_reference="sub-1", card=card, by="carl", why="new",
    )  # fmt: skip
    world.run_for(10 * DAY, step=timedelta(hours=6))
    deviations, comparison = kept.compared()
    assert comparison.unexplained == 0
    assert "an older invoice came first" in deviations["sub-1-p1"].because


def test_an_invoice_with_a_page_in_front_of_the_customer_is_not_foreseen_as_charged(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    start_checkout(world.ports, {"invoice": "sub-1-p0"})
    assert reasons(foreseen(world))["sub-1-p0"].startswith("in flight")


def test_an_invoice_whose_page_is_being_made_is_not_foreseen_as_charged(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()

    def dies(_):
        raise KeyboardInterrupt

    world.transport.before_send = dies
    with pytest.raises(KeyboardInterrupt):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})
    assert reasons(foreseen(world))["sub-1-p0"].startswith("a page for it is open")


def test_what_somebody_asked_for_is_foreseen_although_the_subscription_is_suspended(world):
    world.subscribe("decline_card_expired", interval="day", ends_after_periods=1)
    world.tick()
    world.clock.advance(world.ports.timings.decline_stands)
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(status="suspended", next_billing_at=None)
        )
    card = CardRecord(Secret("approved.new"), None, None, 12, 2040)
    replace_card(
        world.store, world.vault, world.clock,
        subscription_reference="sub-1", card=card, by="carl", why="new",
    )  # fmt: skip
    planned = charges(foreseen(world))
    assert list(planned) == ["sub-1-p0"]
    world.tick()
    assert debited(world) == planned


# --- what cannot be read, and what changes while it is read ------------------------------------


def test_one_unreadable_invoice_costs_itself_and_is_shown(world):
    for name in ("broken", "fine", "tried"):
        world.subscribe("approved", name)
    kept = Kept(world, DAY)
    world.sweep()
    with world.store.transaction() as connection:
        name = tables.invoices.c.reference_id
        connection.execute(
            update(tables.invoices).where(name == "broken-p0").values(currency="XXX")
        )
    lines = foreseen(world, DAY)
    assert reasons(lines) == {
        "broken-p0": "cannot be read: InvalidInput: currency: must be an ISO 4217 code of a "
        "currency to pay in"
    }
    assert set(charges(lines)) == {"fine-p0", "tried-p0"}
    deviations, comparison = kept.compared()
    assert deviations["broken-p0"].kind == "unreadable"
    assert comparison.unexplained == 0
    assert sum(comparison.counts.values()) == 3


def test_open_invoices_of_an_unreadable_subscription_are_shown(world):
    world.subscribe("approved")
    world.sweep()
    world.bell.messages.clear()
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(timezone="Mars/Phobos"))
    told = reasons(foreseen(world))
    assert set(told) == {"sub-1-p0", "sub-1-p1"}
    assert all(reason.startswith("cannot be planned: InvalidInput") for reason in told.values())


def test_a_period_that_is_opened_while_the_book_is_read_is_listed_once(world, monkeypatch):
    world.subscribe("approved")
    agreements_of = forecast.agreements_of

    def overtaken(*arguments):
        found = agreements_of(*arguments)
        world.sweep()
        return found

    monkeypatch.setattr(forecast, "agreements_of", overtaken)
    assert [line.invoice for line in foreseen(world, DAY)] == ["sub-1-p0"]


def test_what_was_paid_while_the_preview_was_made_is_not_unforeseen(world):
    world.subscribe("approved", anchor_at=(START + timedelta(seconds=2)).isoformat())
    world.clock.advance(1)
    made_at = world.clock.now()
    world.clock.advance(1)
    world.tick()
    world.clock.advance(1)
    now = world.clock.now()
    for read_by, unexplained in ((now, 0), (made_at, 1)):
        comparison = Comparison()
        list(compare(world.store, now, made_at, read_by, made_at + DAY, [], comparison))
        assert comparison.unexplained == unexplained


# --- what explains, and what does not ----------------------------------------------------------


def cannot_be_planned(world, reference):
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == reference)
            .values(timezone="Mars/Phobos")
        )


def test_a_subscription_that_is_stuck_explains_its_missing_charges(world):
    for name in ("stuck", "missing"):
        world.subscribe("approved", name, anchor_at=(START + DAY).isoformat())
    kept = Kept(world, 3 * DAY)
    cannot_be_planned(world, "stuck")
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "missing")
            .values(next_billing_at=START + 9 * DAY)
        )
    world.run_for(4 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert deviations["stuck-p0"].because.startswith("subscription.stuck by renew")
    assert "InvalidInput" in deviations["stuck-p0"].because
    assert deviations["missing-p0"].because is None
    assert comparison.unexplained == 1


def test_a_stuck_subscription_that_was_told_of_before_explains_its_missing_charges(world):
    world.subscribe("approved", anchor_at=(START + DAY).isoformat())
    made_before = Kept(world, 3 * DAY)
    cannot_be_planned(world, "sub-1")
    world.run_for(2 * DAY, step=DAY / 2)
    made_before.made_at = world.clock.now()  # as if it had been mended and broken again
    deviations, comparison = made_before.compared()
    assert "the sweep cannot plan it" in deviations["sub-1-p0"].because
    assert comparison.unexplained == 0


def test_trouble_that_is_over_explains_the_charge(world):
    world.subscribe("approved", anchor_at=(START + DAY).isoformat())
    cannot_be_planned(world, "sub-1")
    kept = Kept(world, 3 * DAY)
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(timezone="UTC"))
    world.run_for(2 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert "no more trouble" in deviations["sub-1-p0"].because
    assert comparison.unexplained == 0


def test_an_end_that_was_agreed_later_explains_the_periods_that_are_gone(world):
    world.subscribe("approved", interval="week")
    kept = Kept(world)
    world.clock.advance(1)
    do(world, "change", ends_at=(START + 10 * DAY).isoformat())
    world.run_for(31 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert {d.kind for d in deviations.values()} == {"not_due"}
    assert all("subscription.changed" in d.because for d in deviations.values())
    assert (comparison.unexplained, len(deviations)) == (0, 3)


def test_the_sales_switch_explains_what_waited_for_it_and_no_missing_period(world):
    for name in ("waits", "missing"):
        world.subscribe("approved", name, anchor_at=(START + DAY).isoformat())
    kept = Kept(world, 3 * DAY)
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "missing")
            .values(next_billing_at=START + 9 * DAY)
        )
    kill_switch.switch(world.store, on=False, service=None, by="operator:ann", reason="audit",
                 now=world.clock.now() + timedelta(seconds=1))  # fmt: skip
    world.run_for(2 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert deviations["waits-p0"].because.startswith("sales are switched off; sales.switched by")
    assert deviations["missing-p0"].because is None
    assert comparison.unexplained == 1


def test_what_the_preview_dated_after_its_end_is_no_deviation_once_it_is_charged(world):
    world.subscribe("approved", anchor_at=(START - 40 * DAY).isoformat(), catch_up="collect_all:4")
    kept = Kept(world, 2 * DAY)
    assert "next attempt is later" in reasons(foreseen(world, 2 * DAY)).values()
    world.run_for(10 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert (deviations, comparison.unexplained) == ({}, 0)


def test_a_charge_on_another_day_than_planned_is_a_deviation_with_its_cause(world):
    world.subscribe("decline_insufficient_funds", "late")
    world.subscribe(
        "approved", "early", anchor_at=(START - 40 * DAY).isoformat(), catch_up="collect_all:9"
    )
    kept = Kept(world, 20 * DAY)
    world.tick()
    world.clock.advance(2 * DAY)
    card = CardRecord(Secret("approved.new"), None, None, 12, 2040)
    replace_card(
        world.store, world.vault, world.clock,
        subscription_reference="late", card=card, by="carl", why="new",
    )  # fmt: skip
    dated = next(name for name, row in rows(world).items()
                 if row.status == "open" and name.startswith("early"))  # fmt: skip
    retry_invoice(world.store, world.clock, reference=dated, by="operator:ann", why="asked")
    world.run_for(8 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert {invoice: d.kind for invoice, d in deviations.items()} == {
        "late-p0": "late", dated: "early",
    }  # fmt: skip
    assert "insufficient_funds" in deviations["late-p0"].because
    assert "retry.ordered by operator:ann" in deviations[dated].because
    assert comparison.unexplained == 0


def test_an_attempt_from_before_the_preview_that_is_paid_late_is_the_gateways_word(world):
    world.subscribe("late_after_expiry")
    world.run_for(DAY / 24, step=timedelta(minutes=5))
    kept = Kept(world)
    world.run_for(5 * DAY, step=timedelta(hours=6))
    deviations, comparison = kept.compared()
    assert deviations["sub-1-p0"].kind == "charged"
    assert "before the preview, was paid" in deviations["sub-1-p0"].because
    assert comparison.unexplained == 0


def test_a_cancellation_that_no_sweep_has_carried_out_explains_the_period_that_is_gone(world):
    for name in ("leaving", "staying"):
        world.subscribe("approved", name, anchor_at=(START + 2 * DAY).isoformat())
    kept = Kept(world, 3 * DAY)
    world.clock.advance(DAY)
    do(world, "cancel", "leaving", at_period_end=True)
    world.clock.advance(DAY + timedelta(minutes=5))
    deviations, comparison = kept.compared()
    assert "cancellation_scheduled by operator:ann" in deviations["leaving-p0"].because
    assert comparison.counts["not_due_yet"] == 1, "the next sweep is five minutes late, no more"
    world.clock.advance(DAY / 4)
    deviations, _ = kept.compared()
    assert deviations["staying-p0"].because is None


def test_what_came_after_an_uninvited_charge_does_not_explain_it(world):
    world.subscribe("approved", anchor_at=(START + DAY).isoformat())
    do(world, "pause")
    world.clock.advance(60)
    kept = Kept(world, 20 * DAY)
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(
                status="active", paused_at=None, next_billing_at=START + DAY
            )
        )
    world.run_for(2 * DAY, step=DAY / 2)
    do(world, "pause")
    world.clock.advance(DAY)
    do(world, "resume", shift_anchor=False)
    deviations, comparison = kept.compared()
    assert (deviations["sub-1-p0"].kind, deviations["sub-1-p0"].because) == ("charged", None)
    assert comparison.unexplained == 1


def test_what_was_paid_elsewhere_was_no_charge_and_says_so(world):
    world.subscribe("approved", "planned")
    world.sweep()
    kept = Kept(world, DAY)
    world.subscribe("approved", "unforeseen")
    world.sweep()
    for reference in ("planned-p0", "unforeseen-p0"):
        mark_paid(
            world.store, world.clock, reference=reference, evidence="cash", by="ann", why="desk"
        )
    deviations, comparison = kept.compared()
    assert list(deviations) == ["planned-p0"]
    assert deviations["planned-p0"].because == "paid elsewhere: cash"
    assert comparison.unexplained == 0
