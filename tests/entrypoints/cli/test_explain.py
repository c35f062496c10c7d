from __future__ import annotations

import json
from datetime import timedelta

import pytest
from click.testing import CliRunner

from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.cli import explain as command
from billing_worker.entrypoints.cli.troubles import told
from tests.support.lifecycle import do


@pytest.fixture
def run(database_url, world, monkeypatch):
    monkeypatch.setenv("BILLING_DATABASE_URL", database_url)
    monkeypatch.setattr(command, "SystemClock", lambda: world.clock)
    return lambda *arguments: CliRunner().invoke(cli, ["explain", *arguments])


def test_a_day_of_a_subscription_is_told_in_lines_that_name_rule_person_and_remedy(world, run):
    world.subscribe("approved")
    world.run_for(timedelta(minutes=2))
    do(world, "pause")
    world.clock.advance(timedelta(days=9))
    assert run("sub-1", "--at", "2026-02-05").output == (
        "sub-1 of customer-of-sub-1, now paused\n"
        "  no charge was sent on that day\n"
        "  at 2026-02-05T23:59:59+00:00:\n"
        "  sub-1: It was paused (asked by phone).\n"
        "    rule:   subscription.paused by operator:ann, since 2026-01-31T12:02:00+00:00 "
        "(docs/lifecycle.md)\n"
        "    needed: `billing-worker subscriptions resume sub-1`\n"
    )
    assert "  charge at 2026-01-31" in run("sub-1", "--at", "2026-01-31").output
    assert run("customer-of-sub-1").output.startswith("customer-of-sub-1: 1 subscription(s)\n")
    assert json.loads(run("sub-1", "--json").output)["status"] == "paused"


def test_what_is_asked_badly_is_one_sentence(world, run):
    world.subscribe("approved")
    unknown = run("nobody")
    assert (unknown.exit_code, unknown.output.count("\n")) == (1, 1)
    wrong = run("sub-1", "--at", "yesterday")
    assert told(wrong.exception).message.startswith("Error: at: must be a day")
