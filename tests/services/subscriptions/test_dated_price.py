"""An amount that is agreed for periods from a date on: whoever looks, and whatever comes between."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence import subscriptions as stored
from billing_worker.persistence.figures import due_between
from billing_worker.persistence.schema import tables
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.forecast.preview import preview
from billing_worker.services.import_records.export import record_from
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.invoicing import catch_up
from billing_worker.services.invoicing.catch_up import Answer
from billing_worker.services.reports.describe import Kind, describe
from billing_worker.services.subscriptions import bulk
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.lifecycle import do, invoices, row
from tests.support.recovery import events

DAY = timedelta(days=1)
MARCH, LATER = "2026-03-15T00:00:00Z", "2026-05-15T00:00:00Z"
"""Periods begin on 31 Jan, 28 Feb, 31 Mar and 30 Apr: the first new one is that of 31 Mar."""


def agree(world, amount="12.50", since=MARCH, **options):
    return do(world, "change", amount=amount, amount_from=since, **options)


def amounts(world):
    return [one.amount_minor for one in invoices(world)]


def foreseen(world, days):
    now = world.clock.now()
    found = preview(world.store, now, now + days * DAY)
    return [one.money.minor for one in found if one.reason is None]


def told(world):
    with world.store.reading() as connection:
        return describe(connection, Kind.SUBSCRIPTION, "sub-1")


@pytest.fixture
def paid(world):
    world.subscribe("approved")
    world.tick()
    return world


def test_periods_before_the_date_cost_the_old_amount_and_periods_from_it_on_the_new_one(paid):
    done = agree(paid)
    assert done.details["changes"] == {
        "new_amount": [None, "12.50 USD from 2026-03-15T00:00:00+00:00"]
    }
    assert (done.details["from_period"], done.details["from"][:10]) == (2, "2026-03-31")
    promised = foreseen(paid, 100)
    paid.run_for(100 * DAY, step=DAY / 2)
    assert amounts(paid)[1:] == promised == [999, 1250, 1250]
    assert row(paid).amount_minor == 1250
    assert row(paid).new_amount_from is None


def test_a_state_shows_the_coming_amount_and_an_event_says_when_it_counts(paid):
    agree(paid)
    state = told(paid)["state"]
    assert (state["amount"], state["new_amount"]) == ("9.99", "12.50")
    assert state["new_amount_from"].startswith("2026-03-15")
    assert "12.50 for periods from 2026-03-15" in told(paid)["words"]
    paid.run_for(60 * DAY, step=DAY)
    assert told(paid)["state"]["new_amount"] is None
    [repriced] = events(paid, "subscription.repriced")
    assert (repriced["was"], repriced["amount"]) == ("9.99 USD", "12.50 USD")
    assert repriced["from_period"] == 2


def test_the_figure_of_what_becomes_due_has_the_new_amount(paid):
    agree(paid, since="2026-02-10T00:00:00Z")
    with paid.store.reading() as connection:
        now = paid.clock.now()
        assert due_between(connection, now, now + 40 * DAY) == {"USD": 1250}


def test_late_periods_from_before_the_date_keep_the_old_amount(world):
    world.subscribe("approved", catch_up="collect_all:1")
    world.tick()
    agree(world)
    world.clock.advance(95 * DAY)
    lines = list(catch_up.plan(world.store, world.clock.now(), Answer()))
    world.run_for(5 * DAY, step=DAY / 2)
    assert amounts(world)[1:] == [999, 1250, 1250]
    assert [line.money.minor for line in lines] == [999, 1250, 1250]


def test_a_later_date_takes_the_place_of_the_one_agreed_before_and_says_so(paid):
    agree(paid)
    done = agree(paid, "14.00", LATER)
    assert done.details["changes"]["new_amount"] == [
        "12.50 USD from 2026-03-15T00:00:00+00:00",
        "14.00 USD from 2026-05-15T00:00:00+00:00",
    ]
    assert agree(paid, "14.00", LATER).outcome == "unchanged"
    assert foreseen(paid, 130) == [999, 999, 999, 1400]


@pytest.mark.parametrize(
    ("then", "amount"),
    [
        ({"amount": "11.00"}, 1100),
        ({"amount": "9.99"}, 999),
        ({"amount": "8.00", "currency": "EUR"}, 800),
        ({"interval": "quarter"}, 999),
        ({"amount_from": ""}, 999),
        ({"amount": "9.99", "amount_from": LATER}, 999),
    ],
)
def test_other_terms_or_empty_text_take_back_what_was_agreed_for_later(paid, then, amount):
    agree(paid)
    done = do(paid, "change", **then)
    assert done.details["changes"]["new_amount"][1] is None
    assert set(foreseen(paid, 200)) == {amount}


@pytest.mark.parametrize("then", [{"description": "Pro"}, {"catch_up": "hold"}])
def test_terms_beside_the_price_leave_what_was_agreed_for_later(paid, then):
    agree(paid)
    do(paid, "change", **then)
    assert foreseen(paid, 100) == [999, 1250, 1250]


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"amount_from": "2026-01-01T00:00:00Z"}, "amount_from", "must be in the future"),
        ({"amount_from": "2026-03-15"}, "amount_from", "UTC offset"),
        ({"amount_from": "soon"}, "amount_from", "ISO 8601"),
        ({"amount_from": ""}, "amount_from", "is empty"),
        ({"amount": None}, "amount", "is needed"),
        ({"currency": "EUR"}, "currency", "for later"),
        ({"interval": "year"}, "amount_from", "the amount alone"),
        ({"description": ""}, "amount_from", "the amount alone"),
    ],
)
def test_what_cannot_be_agreed_for_later_is_refused_in_words(paid, given, field, words):
    with pytest.raises(InvalidInput) as refused:
        do(paid, "change", **({"amount": "12.50", "amount_from": MARCH} | given))
    assert refused.value.field == field
    assert words in refused.value.reason
    assert row(paid).new_amount_from is None


def test_a_date_after_the_last_period_is_refused(world):
    world.subscribe("approved", ends_after_periods=2)
    with pytest.raises(InvalidInput, match="no period begins"):
        agree(world)
    assert agree(world, since="2026-02-10T00:00:00Z").outcome == "changed"


def test_instalments_from_the_date_on_cost_the_new_amount(world):
    world.subscribe("approved", ends_after_periods=4)
    world.tick()
    agree(world)
    world.run_for(120 * DAY, step=DAY / 2)
    assert amounts(world) == [999, 999, 1250, 1250]
    assert row(world).status == "ended"


@pytest.mark.parametrize("shift", [False, True])
def test_a_pause_over_the_date_ends_at_the_new_amount(paid, shift):
    agree(paid)
    do(paid, "pause", until="2026-04-10T00:00:00Z", shift_anchor=shift)
    [first, *_] = foreseen(paid, 130)
    paid.run_for(130 * DAY, step=DAY)
    assert amounts(paid)[1] == first == 1250


def test_a_moved_billing_day_is_charged_by_the_date_on_which_it_begins(paid):
    agree(paid, since="2026-03-05T00:00:00Z")
    do(paid, "reschedule", days=7)  # from 28 Feb to 7 Mar
    assert foreseen(paid, 40) == [1250]


def test_a_decision_told_of_late_gives_each_period_the_amount_of_its_time(paid):
    """The sweep has opened periods at both amounts; nobody was charged: the cards were refused."""
    agree(paid)
    when = paid.clock.now() + 2 * DAY
    paid.transport.unreachable = True
    paid.run_for(70 * DAY, step=DAY)
    assert amounts(paid)[1:] == [999, 1250]
    done = do(paid, "change", description="Pro", decided_at=when)
    assert done.outcome == "changed"
    assert row(paid).new_amount_minor == 1250
    paid.transport.unreachable = False
    paid.run_for(5 * DAY, step=DAY)
    assert amounts(paid)[1:] == [999, 1250]
    assert row(paid).amount_minor == 1250


def test_a_price_that_counts_already_is_taken_back_by_a_decision_of_before(paid):
    agree(paid)
    when = paid.clock.now() + 2 * DAY
    paid.transport.unreachable = True
    paid.run_for(60 * DAY, step=DAY)
    assert row(paid).amount_minor == 1250
    do(paid, "change", amount_from="", decided_at=when)
    assert (row(paid).amount_minor, row(paid).new_amount_from) == (999, None)
    paid.transport.unreachable = False
    paid.run_for(40 * DAY, step=DAY)
    assert set(amounts(paid)) == {999}
    do(paid, "change", description="Pro", decided_at=when + DAY)
    assert row(paid).new_amount_from is None, "what was taken back comes again"


def test_a_change_told_of_after_its_date_counts_for_periods_that_nobody_has_charged(paid):
    paid.transport.unreachable = True
    paid.run_for(60 * DAY, step=DAY)
    agree(paid, decided_at=paid.clock.now() - 58 * DAY)
    paid.transport.unreachable = False
    paid.run_for(2 * DAY, step=DAY)
    assert amounts(paid)[1:] == [999, 1250]


def test_it_is_exported_and_imported_again(paid):
    agree(paid)
    with paid.store.reading() as connection:
        [whole] = stored.whole(connection, ["sub-1"])
    record = record_from(whole, paid.vault).as_json(with_token=True)
    assert (record["new_amount"], record["new_amount_from"]) == ("12.50", MARCH)
    there = parse_record(record | {"reference_id": "sub-2"})
    subscribe(paid.store, paid.vault, paid.clock, [there], by="test")
    assert row(paid, "sub-2").new_amount_minor == 1250
    again = parse_record(record)
    assert subscribe(paid.store, paid.vault, paid.clock, [again], by="test").outcomes == (
        "unchanged",
    )


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"new_amount": "12.50"}, "new_amount_from"),
        ({"new_amount_from": MARCH}, "new_amount_from"),
        ({"new_amount": "-1", "new_amount_from": MARCH}, "new_amount"),
    ],
)
def test_a_record_names_amount_and_date_together(world, given, field):
    with pytest.raises(Exception, match=field):
        world.subscribe("approved", **given)


def test_another_currency_converts_what_is_agreed_for_later_too(paid):
    agree(paid, "20.00")
    bulk.redenominate(
        paid.store, paid.clock, old="USD", new="EUR", rate="2", by="ann", why="euro", dry_run=False
    )
    assert foreseen(paid, 100) == [500, 1000, 1000]


def test_many_are_changed_from_a_date_on_after_a_look(world):
    for reference in ("sub-1", "sub-2"):
        world.subscribe("approved", reference=reference)
    ask = {"where": {"amount": "9.99", "currency": "USD"}, "by": "ann", "amount": "12.50"}
    looked = bulk.change_where(world.store, world.clock, dry_run=True, amount_from=MARCH, **ask)
    assert (looked.changed, row(world).new_amount_minor) == (2, None)
    assert looked.examples[0]["after"] == "12.50 USD from 2026-03-15T00:00:00+00:00"
    bulk.change_where(world.store, world.clock, dry_run=False, amount_from=MARCH, **ask)
    assert [row(world, one).new_amount_minor for one in ("sub-1", "sub-2")] == [1250, 1250]
    again = bulk.change_where(world.store, world.clock, dry_run=False, amount_from=MARCH, **ask)
    assert (again.changed, again.unchanged) == (0, 2)


def test_a_command_agrees_on_it_and_takes_it_back(paid):
    def command(reference, **terms):
        arguments = {"reference_id": reference, "subscription": "sub-1", **terms}
        return carry_out(paid.ports, Message("billing.change_subscription", arguments, reference))

    assert command("c1", amount="12.50", amount_from=MARCH).status == "done"
    with paid.store.reading() as connection:
        kept = connection.execute(select(tables.commands.c.arguments)).scalars().one()
    assert kept["amount_from"] == MARCH
    assert row(paid).new_amount_minor == 1250
    assert command("c2", amount_from="").status == "done"
    assert row(paid).new_amount_minor is None


def test_a_withdrawal_that_comes_after_the_first_charge_names_it_and_the_next_one_is_of_the_old_amount(
    paid,
):
    agree(paid)
    when = paid.clock.now() + 2 * DAY
    paid.run_for(60 * DAY, step=DAY / 2)
    assert amounts(paid) == [999, 999, 1250]
    done = do(paid, "change", amount_from="", decided_at=when)
    assert done.details["charged_since"] == ["sub-1-p1", "sub-1-p2"]
    paid.run_for(40 * DAY, step=DAY / 2)
    assert amounts(paid) == [999, 999, 1250, 999]
    assert len(events(paid, "subscription.repriced")) == 1
