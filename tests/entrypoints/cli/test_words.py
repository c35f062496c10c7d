"""What the command line prints for people is in words: no value of a program's is shown as it is."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re

import pytest
from click.testing import CliRunner

from billing_worker.entrypoints import cli as commands
from billing_worker.entrypoints.cli import cli, shared
from billing_worker.services.outbox.publish import publish
from tests.entrypoints.test_config import GOOD
from tests.support.lifecycle import DAY

NOT_WORDS = re.compile(r"\bNone\b|\[\]|\{\}|\['|\bnull\b|\bTrue\b|\bFalse\b|datetime\.|<\w+\.\w+")
CARD = json.dumps({"token": "approved.9", "mask": "512381******0000", "expiry_month": 12,
                   "expiry_year": 2032})  # fmt: skip


@pytest.fixture
def said(world, database_url, monkeypatch):
    """Runs a command on the world's database and clock. Returns what it printed."""
    for name, value in (GOOD | {"BILLING_DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)
    for found in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        module = importlib.import_module(found.name)
        # What compares this machine's clock with the database's goes by the real one.
        if hasattr(module, "SystemClock") and module is not shared:
            monkeypatch.setattr(module, "SystemClock", lambda: world.clock)

    def said(line, **options):
        result = CliRunner().invoke(cli, line.split(), catch_exceptions=False, **options)
        assert result.exit_code in {0, 1}, result.output
        words = re.sub(r"(?m)^ +(sent|got): .*$", "", result.output)  # what went over the wire
        assert not NOT_WORDS.search(words), f"{line}\n{words}"
        return result.output

    return said


def test_every_decision_about_a_subscription_is_answered_in_words(world, said):
    world.subscribe("approved", interval="week", description=None)
    world.tick()
    change = "subscriptions change sub-1"
    assert "amount           9.99 USD -> 12.50 USD" in said(f"{change} --amount 12.50")
    assert "description      none -> Pro" in said(f"{change} --description Pro")
    assert "new amount       none -> 14.00 USD from" in said(
        f"{change} --amount 14.00 --from 2026-09-01T00:00:00Z"
    )
    said(f"{change} --ends-at 2027-01-31T00:00:00Z")
    said(f"{change} --amount 12.50 --dry-run --where currency=USD".replace("sub-1 ", ""))
    said(f"{change} --description Plan --dry-run --where currency=USD".replace("sub-1 ", ""))
    assert "free" not in said("subscriptions reschedule sub-1 --days 3")
    assert "free periods     1, 2" in said("subscriptions reschedule sub-1 --free-periods 2")
    said("subscriptions pause sub-1")
    assert "skipped" not in said("subscriptions resume sub-1 --keep-anchor")
    said("subscriptions pause sub-1 --until 2026-03-31T00:00:00Z --shift-anchor")
    world.clock.advance(50 * DAY)
    assert "skipped periods  3 to 6" in said("subscriptions resume sub-1 --keep-anchor")
    said("subscriptions cancel sub-1 --at-period-end")
    said("subscriptions uncancel sub-1")
    said("subscriptions cancel sub-1 --now --and-void")
    said("subscriptions cancel sub-1 --now")
    said("subscriptions end sub-1")
    said("subscriptions list")
    said("subscriptions show sub-1")


def test_cards_customers_invoices_and_reports_are_answered_in_words(world, said):
    world.subscribe("decline_insufficient_funds", "sub-1")
    world.subscribe("approved", "sub-2", trial_end="2026-02-10T00:00:00Z")
    world.subscribe(None, "sub-3")
    world.tick()
    said("customers update customer-of-sub-1 --name Jo")
    said("customers update customer-of-sub-1 --name Jo")
    said("cards list customer-of-sub-1")
    said("cards replace sub-1", input=CARD)
    said("cards add-backup sub-2 --consent form", input=CARD.replace(".9", ".8"))
    said("cards list sub-2")
    said("subscriptions dunning sub-1 short --why asked")
    said("invoices retry sub-1-p0 --why asked")
    world.run_for(2 * DAY, step=DAY)
    publish(world.store, world.clock)
    said("invoices void sub-3-p0 --why goodwill")
    for reference in ("sub-1-p0", "sub-2-p0", "sub-3-p0"):
        said(f"explain {reference}")
    for reference in ("sub-1", "sub-2", "sub-3"):
        said(f"subscriptions show {reference}")
    for line in ("subscriptions list", "status", "commands", "events list", "events stuck",
                 "webhooks list", "webhooks deliveries", "catch-up plan",
                 "preview --until 2026-05-01T00:00:00Z"):  # fmt: skip
        said(line)
