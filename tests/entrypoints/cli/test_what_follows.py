"""What commands of operators answer: what really happens next, and when."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from click.testing import CliRunner

from billing_worker.entrypoints.cli import cards, cli, invoices, lifecycle, sales, subscriptions
from billing_worker.services.kill_switch import switch
from tests.entrypoints.test_config import GOOD
from tests.support.world import KEY

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SAID = ("--by", "ann", "--why", "x")
WAITS = "because an earlier attempt may still be paid until then"


@pytest.fixture
def run(world, database_url, monkeypatch):
    settings = {"BILLING_DATABASE_URL": database_url, "BILLING_VAULT_KEYS": KEY}
    for name, value in (GOOD | settings).items():
        monkeypatch.setenv(name, value)
    for module in (cards, invoices, lifecycle, sales, subscriptions):
        monkeypatch.setattr(module, "SystemClock", lambda: world.clock)

    def run(*arguments, **options):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False, **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def expired(world):
    """A sale that may have arrived, and whose invoice has expired undecided."""
    world.subscribe("pending_forever", ends_after_periods=1)
    world.run_for(2 * HOUR + 10 * MINUTE, step=5 * MINUTE)
    assert world.attempts() == ["not_charged"]
    return world


def turn(world, *, on, service=None):
    switch(world.store, on=on, service=service, by="ann", reason="x", now=world.clock.now())


def test_a_retry_that_waits_for_late_money_says_until_when_and_why(expired, run):
    until = expired.explain()["next_attempt_at"]
    told = run("invoices", "retry", "sub-1-p0", *SAID)
    assert f"It is charged at {until}" in told
    explained = run("explain", "sub-1-p0")
    assert f"It is charged at {until}" in explained
    assert "an earlier attempt may still be paid, so the next one waits" in explained
    expired.tick()
    assert expired.explain()["next_attempt_at"] == until
    again = json.loads(run("invoices", "retry", "sub-1-p0", *SAID, "--json"))
    assert again["next_attempt_at"] == until


def test_a_card_that_is_tried_right_after_a_decline_says_when(world, run):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    at = (world.clock.now() + 10 * MINUTE).isoformat()
    told = run("cards", "replace", "sub-1", input=json.dumps({"token": "approved.new"}))
    assert f"tried: sub-1-p0. It is charged at {at}, {WAITS}" in told


def test_what_is_switched_off_comes_first(world, run):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    turn(world, on=False, service="payment_card_usd_hpp")
    told = run("invoices", "retry", "sub-1-p0", *SAID)
    assert "but not before `sales start --service payment_card_usd_hpp`" in told
    turn(world, on=False)
    assert "but not before sales are started again" in run("explain", "sub-1-p0")


def test_a_resumption_says_when_what_is_open_is_charged(world, run):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    dated = world.explain()["next_attempt_at"]
    run("subscriptions", "pause", "sub-1")
    told = run("subscriptions", "resume", "sub-1", "--keep-anchor")
    assert f"sub-1-p0: It is charged at {dated}" in told


def test_a_resolution_says_what_follows_although_another_attempt_is_dated(world, run):
    world.subscribe("pending_forever")
    world.run_for(10 * MINUTE)
    told = run("invoices", "resolve", "sub-1-p0", "--not-paid", "--evidence", "x", *SAID)
    assert "Nothing by itself; `invoices retry sub-1-p0` charges it" in told


def test_started_sales_say_what_is_due(world, run):
    world.subscribe("approved")
    world.subscribe("approved", "sub-2", anchor_at=(world.clock.now() + DAY).isoformat())
    turn(world, on=False)
    world.sweep()
    told = run("sales", "start", "--reason", "x")
    assert "Sales are on: 1 invoice(s) are due now" in told
    turn(world, on=False, service="payment_card_usd_hpp")
    assert "paused: payment_card_usd_hpp" in run("sales", "start", "--reason", "x")


def test_activated_imports_say_when_the_next_period_is_due(world, run, tmp_path):
    record = {
        "reference_id": "sub-9", "customer": {"reference_id": "c-9"}, "card": {"token": "approved.9"},
        "amount": "9.99", "currency": "USD", "interval": "month",
        "anchor_at": (world.clock.now() + DAY).isoformat(),
    }  # fmt: skip
    (tmp_path / "held.jsonl").write_text(json.dumps(record) + "\n")
    run("subscriptions", "import", str(tmp_path / "held.jsonl"), "--held")
    told = run("subscriptions", "activate", "sub-9")
    due = (world.clock.now() + DAY).isoformat()
    assert f"1 activated. The next period of any subscription is due at {due}" in told
