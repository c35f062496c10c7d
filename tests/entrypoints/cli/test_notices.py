"""The command line of notices: what people type, and what they are told."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from billing_worker.clock import SystemClock
from billing_worker.entrypoints.cli import cli
from tests.entrypoints.test_config import GOOD
from tests.support.world import KEY, World


@pytest.fixture
def run(store, database_url, monkeypatch):
    world = World(store)
    world.clock.advance(SystemClock().now() - world.clock.now())  # the command line's
    world.subscribe()
    world.tick()
    settings = {"BILLING_DATABASE_URL": database_url, "BILLING_VAULT_KEYS": KEY,
                "BILLING_NOTICES": "require"}  # fmt: skip
    for name, value in (GOOD | settings).items():
        monkeypatch.setenv(name, value)

    def run(*arguments, status=0):
        result = CliRunner().invoke(cli, ["subscriptions", *arguments], catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result.output

    return run


def test_a_person_says_that_a_customer_was_told_and_hears_from_when_the_charge_is_made(run):
    said = run("notice-sent", "sub-1", "1", "9.99", "USD")
    assert "sub-1-p1: the customer was told at" in said
    assert "It is charged at" in said
    shown = json.loads(run("show", "sub-1", "--json"))
    [told] = [e for e in shown["history"] if e["kind"] == "notice.accepted"]
    assert (told["data"]["period"], told["data"]["amount"]) == (1, "9.99 USD")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("sub-9", "1", "9.99", "USD"), "subscription"),
        (("sub-1", "5", "9.99", "USD"), "period"),
        (("sub-1", "1", "9.98", "USD"), "amount"),
        (("sub-1", "1", "9.99", "USD", "--sent-at", "2099-01-01T00:00:00Z"), "sent_at"),
    ],
)
def test_what_cannot_have_been_told_is_refused_by_name(run, arguments, field):
    assert field in run("notice-sent", *arguments, status=1)


def test_a_policy_is_given_by_a_change_and_shown_as_one(run):
    run("change", "sub-1", "--notices", "require:30")
    shown = json.loads(run("show", "sub-1", "--json"))
    assert shown["history"][-1]["data"]["changes"] == {"notices": [None, "require:30"]}
    assert shown["notices"] == "require:30"
