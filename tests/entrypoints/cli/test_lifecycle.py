"""`subscriptions change | pause | resume | cancel | uncancel | end`, and `catch-up`."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from click.testing import CliRunner

from billing_worker.clock import SystemClock
from billing_worker.entrypoints.cli import catch_up as catch_up_command
from billing_worker.entrypoints.cli import cli, lifecycle, shared
from billing_worker.persistence.store import Store
from tests.entrypoints.test_config import GOOD
from tests.support.world import World

DAY = timedelta(days=1)


@pytest.fixture
def run(world, database_url, monkeypatch):
    for name, value in (GOOD | {"BILLING_DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)
    for module in (lifecycle, catch_up_command):
        monkeypatch.setattr(module, "SystemClock", lambda: world.clock)

    def run(*arguments, status=0):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result

    return run


def asked(run, *arguments, status=0):
    return json.loads(run("subscriptions", *arguments, "--json", status=status).stdout)


def test_a_subscription_is_led_through_its_life_from_the_command_line(world, run):
    world.subscribe("approved", interval="week")
    world.tick()
    assert asked(run, "change", "sub-1", "--amount", "19.99")["details"]["from_period"] == 1
    assert asked(run, "pause", "sub-1", "--why", "holidays")["status"] == "paused"
    world.clock.advance(10 * DAY)
    resumed = asked(run, "resume", "sub-1", "--keep-anchor")
    assert (resumed["status"], resumed["details"]["skipped_periods"]) == ("active", [1, 1])
    assert asked(run, "cancel", "sub-1", "--at-period-end")["cancels_at"]
    assert asked(run, "uncancel", "sub-1")["cancels_at"] is None
    assert asked(run, "end", "sub-1")["status"] == "ended"
    refused = asked(run, "cancel", "sub-1", "--now", status=1)
    assert refused == {"error": {"field": "status", "reason": "is ended"}}


def test_a_decision_may_be_said_with_the_time_when_it_was_made(world, run):
    world.subscribe("approved", interval="week")
    world.tick()
    at = world.clock.now().isoformat()
    world.clock.advance(8 * DAY)
    world.sweep()
    paused = asked(run, "pause", "sub-1", "--decided-at", at)
    assert (paused["status"], paused["decided_at"]) == ("paused", at)
    assert world.fate("sub-1-p1") == "void"
    for wrong in ("2026-02-01T00:00:00", "yesterday"):
        said = run("subscriptions", "resume", "sub-1", "--keep-anchor", "--decided-at", wrong,
                   status=2).stderr  # fmt: skip
        assert "--decided-at" in said


def test_an_error_names_the_field_and_the_reason(world, run):
    world.subscribe("approved")
    result = run("subscriptions", "change", "sub-1", "--amount", "9.999", status=1)
    assert "amount: USD has 2 decimals, not 3" in result.stderr
    assert "reference_id" in run("subscriptions", "pause", "nobody", status=1).stderr


@pytest.mark.parametrize(
    ("command", "either"),
    [("resume", "--shift-anchor or --keep-anchor"), ("cancel", "--now or --at-period-end")],
)
def test_how_to_resume_and_when_to_cancel_must_be_said(run, command, either):
    assert f"Say {either}." in run("subscriptions", command, "sub-1", status=2).stderr


def test_a_catch_up_is_planned_applied_under_caps_and_finished(world, run):
    for number in range(3):
        world.subscribe("approved", f"sub-{number}", interval="day")
    world.clock.advance(2 * DAY + timedelta(hours=5))
    planned = json.loads(run("catch-up", "plan", "--json").stdout)
    assert planned["totals"] == [
        {"action": "collect", "currency": "USD", "count": 3, "amount": "29.97"},
        {"action": "waive", "currency": "USD", "count": 6, "amount": "59.94"},
    ]
    assert "29.97" in run("catch-up", "plan").stdout
    some = ("catch-up", "apply", "--why", "outage", "--max-amount", "20 USD", "--json")
    applied = json.loads(run(*some).stdout)
    assert (applied["complete"], len(applied["lines"])) == (False, 6)
    rest = json.loads(run("catch-up", "apply", "--why", "outage", "--json").stdout)
    assert applied["lines"] + rest["lines"] == planned["lines"]
    world.tick()
    assert world.debits().total() == 3


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--policy", ("plan", "--policy", "collect_all")),
        ("--max-age", ("plan", "--max-age", "0")),
        ("--why", ("apply",)),
        ("--max-amount", ("apply", "--why", "x", "--max-amount", "20")),
        ("--max-amount", ("apply", "--why", "x", "--max-amount", "20.001 USD")),
        ("--max-count", ("apply", "--why", "x", "--max-count", "-1")),
    ],
)
def test_arguments_of_catch_up_that_make_no_sense_are_refused_by_name(run, option, arguments):
    told = run("catch-up", *arguments, status=2).stderr
    assert f"'{option}'" in told


def test_what_is_still_owed_is_named_and_voided_with_the_subscription(world, run):
    world.subscribe("decline_insufficient_funds", ends_after_periods=1)
    world.tick()
    refused = run("subscriptions", "cancel", "sub-1", "--now", status=1)
    assert "1 invoice stays owed and collected: sub-1-p0" in refused.stderr
    assert asked(run, "cancel", "sub-1", "--now", "--and-void")["details"]["voided"] == 1
    world.subscribe("decline_insufficient_funds", "sub-2")
    world.tick()
    assert asked(run, "end", "sub-2", "--and-void")["details"]["voided"] == 1


SAID = ("--by", "ann", "--why", "x")
DATED = [
    ("subscriptions", "change", "sub-1", "--amount", "19.99"),
    ("subscriptions", "export", "--with-tokens", "--hand-over", "--why", "x"),
    ("sales", "start", "--reason", "x"),
    ("invoices", "pay-link", "sub-1-p0"),
    ("invoices", "resolve", "sub-1-p0", "--paid", "--evidence", "x", *SAID),
    ("invoices", "mark-paid", "sub-1-p0", "--evidence", "x", *SAID),
]
"""Commands that date what money depends on."""


@pytest.fixture
def off(monkeypatch):
    """Set this machine's clock, for commands on such a database."""

    def off(url, by):
        class Wrong(SystemClock):
            def now(self):
                return super().now() + by

        for name, value in (GOOD | {"BILLING_DATABASE_URL": url}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(shared, "SystemClock", Wrong)

    return off


@pytest.mark.parametrize("command", DATED)
def test_a_machine_whose_clock_is_wrong_decides_nothing(postgres_url, off, command):
    off(postgres_url, 60 * DAY)
    refused = CliRunner().invoke(cli, command)
    assert refused.exit_code == 1
    assert "60 days, 0:00:00 ahead of the database's: set it right" in refused.output


def test_on_sqlite_a_clock_that_went_back_decides_nothing_until_a_person_says_that_it_is_right(
    sqlite_url, off
):
    with Store(sqlite_url) as store:
        world = World(store)
        world.clock = SystemClock()
        world.subscribe("approved")
    off(sqlite_url, -60 * DAY)
    [change, _, start, *_] = DATED
    refused = CliRunner().invoke(cli, change)
    assert refused.exit_code == 1
    assert "60 days, 0:00:00 behind the newest entry of the history" in refused.output
    assert CliRunner().invoke(cli, start).exit_code == 0
