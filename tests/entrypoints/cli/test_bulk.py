"""One decision about many subscriptions, looked at before it is made."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from click.testing import CliRunner
from sqlalchemy import select, update

from billing_worker.entrypoints.cli import bulk, cli, lifecycle
from billing_worker.persistence.schema import tables
from tests.entrypoints.test_config import GOOD

DAY = timedelta(days=1)
WHY = ("--why", "new price list", "--json")


@pytest.fixture
def run(world, database_url, monkeypatch):
    """The command line on the world's database and clock; returns its result."""
    for name, value in (GOOD | {"BILLING_DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)
    for module in (bulk, lifecycle):
        monkeypatch.setattr(module, "SystemClock", lambda: world.clock)

    def run(*arguments, status=0):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result

    return run


def prices(world):
    c = tables.subscriptions.c
    with world.store.reading() as connection:
        rows = connection.execute(select(c.reference_id, c.amount_minor, c.currency)).all()
    return {row.reference_id: (row.amount_minor, row.currency) for row in rows}


def changed(world, run, *options, status=0):
    before = prices(world)
    out = run("subscriptions", "change", *options, *WHY, status=status).stdout
    return json.loads(out), before


def test_a_price_is_changed_for_all_who_have_the_old_one_and_the_dry_run_says_it_before(world, run):
    for number in range(3):
        world.subscribe("approved", f"sub-{number}", anchor_at="2099-01-31T00:00:00Z")
    world.subscribe("approved", "other", amount="5.00", anchor_at="2099-01-31T00:00:00Z")
    options = ("--where", "amount=9.99", "--where", "currency=USD", "--amount", "12.50")
    looked, before = changed(world, run, *options, "--dry-run")
    assert prices(world) == before
    assert (looked["changed"], looked["refused"]) == (3, {})
    assert looked["examples"][0]["before"] == "9.99 USD"
    done, _ = changed(world, run, *options)
    assert done == looked
    assert prices(world) == before | {f"sub-{number}": (1250, "USD") for number in range(3)}
    again, _ = changed(world, run, *options)
    assert again["changed"] == 0


def test_a_price_is_agreed_for_a_date_for_one_and_for_all_and_shown_until_then(world, run):
    for number in range(2):
        world.subscribe("approved", f"sub-{number}")
    date = ("--amount", "12.50", "--from", "2026-03-15T00:00:00Z", "--json")
    one = json.loads(run("subscriptions", "change", "sub-0", *date).stdout)
    assert one["details"]["from"].startswith("2026-03-31")
    where = ("--where", "amount=9.99", "--where", "currency=USD")
    looked = json.loads(run("subscriptions", "change", *where, *date, "--dry-run").stdout)
    assert (looked["changed"], looked["unchanged"]) == (1, 1)
    assert json.loads(run("subscriptions", "change", *where, *date).stdout) == looked
    shown = json.loads(run("subscriptions", "show", "sub-1", "--json").stdout)
    assert (shown["amount"], shown["new_amount"]) == ("9.99", "12.50")
    past = ("--amount", "12.50", "--from", "2025-03-15T00:00:00Z")
    assert (
        "must be in the future" in run("subscriptions", "change", "sub-1", *past, status=1).stderr
    )


def test_what_cannot_be_changed_is_named_and_stops_no_other(world, run):
    world.subscribe("approved", "sub-1", anchor_at="2099-01-31T00:00:00Z")
    world.subscribe("approved", "sub-2", anchor_at="2099-01-31T00:00:00Z", currency="EUR")
    options = ("--where", "interval=month", "--currency", "EUR")
    report, _ = changed(world, run, *options, status=1)
    assert set(report["refused"]) == {"sub-1"}
    assert report["unchanged"] == 1


@pytest.mark.parametrize(
    "options",
    [(), ("sub-1", "--where", "currency=USD"), ("sub-1", "--dry-run")],
)
def test_a_change_is_of_one_or_of_all_with_certain_terms(run, options):
    run("subscriptions", "change", *options, "--amount", "1.00", status=2)


@pytest.mark.parametrize("where", ["status=active", "amount=9.99", "interval=fortnight", "x"])
def test_terms_that_nobody_can_look_for_are_refused(run, where):
    told = run("subscriptions", "change", "--where", where, "--amount", "1.00", status=1).stderr
    assert "where" in told


# --- another currency ----------------------------------------------------------------------------


@pytest.fixture
def leva(world):
    for number, minor in enumerate((1999, 100, 1)):
        world.subscribe("approved", f"sub-{number}", anchor_at="2099-01-31T00:00:00Z")
        row = tables.subscriptions.c.reference_id == f"sub-{number}"
        with world.store.transaction() as connection:
            terms = {"amount_minor": minor, "currency": "BGN"}
            connection.execute(update(tables.subscriptions).where(row).values(**terms))
    return world


def redenominated(run, *options, status=0):
    out = run(
        "subscriptions", "redenominate", "BGN", "EUR", "1.95583", *WHY, *options, status=status
    )
    return json.loads(out.stdout)


def test_a_withdrawn_currency_is_left_by_its_full_rate_rounded_to_the_cent(leva, run):
    before = prices(leva)
    looked = redenominated(run, "--dry-run")
    assert prices(leva) == before
    assert looked["totals"] == {"EUR": "10.74"}
    assert looked["examples"][0] == {
        "subscription": "sub-0", "before": "19.99 BGN", "after": "10.22 EUR",
    }  # fmt: skip
    assert redenominated(run) == looked
    assert prices(leva) == {"sub-0": (1022, "EUR"), "sub-1": (51, "EUR"), "sub-2": (1, "EUR")}
    assert redenominated(run)["changed"] == 0


def test_what_would_be_less_than_a_cent_is_refused_by_name_and_stays(leva, run):
    out = run("subscriptions", "redenominate", "BGN", "EUR", "3", *WHY, status=1).stdout
    assert set(json.loads(out)["refused"]) == {"sub-2"}
    assert prices(leva) == {"sub-0": (666, "EUR"), "sub-1": (33, "EUR"), "sub-2": (1, "BGN")}


@pytest.mark.parametrize("wrong", [("EUR", "0"), ("EUR", "x"), ("XXX", "2"), ("BGN", "2")])
def test_a_rate_or_currency_that_makes_no_sense_is_refused(leva, run, wrong):
    before = prices(leva)
    run("subscriptions", "redenominate", "BGN", *wrong, *WHY, status=1)
    assert prices(leva) == before
