"""Terms change from the next period on; what is asked twice or wrongly changes nothing."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence import subscriptions as stored
from billing_worker.persistence.schema import tables
from billing_worker.services.import_records.export import record_from
from billing_worker.services.import_records.subscription import (
    BadRecord,
    parse_record,
)
from tests.support.lifecycle import DAY, do, history, invoices, next_dates, row
from tests.support.world import START


def everything(world):
    with world.store.reading() as connection:
        return [
            connection.execute(select(table).order_by(table.c.id)).all()
            for table in (tables.subscriptions, tables.invoices, tables.attempts, tables.events)
        ]


def test_the_31st_is_kept_from_month_to_year_and_back(world):
    world.subscribe("approved")  # on 31 Jan
    world.tick()
    do(world, "change", interval="year")
    assert next_dates(world, 4) == ["28 Feb 2026", "28 Feb 2027", "29 Feb 2028", "28 Feb 2029"]
    world.run_for(30 * DAY, step=DAY)
    do(world, "change", interval="month")
    assert next_dates(world, 3) == ["28 Feb 2027", "31 Mar 2027", "30 Apr 2027"]


@pytest.mark.parametrize("again", [1, 3])
def test_the_31st_is_kept_through_short_pauses_that_shift_the_anchor(world, again):
    world.subscribe("approved")
    world.tick()
    for _ in range(again):
        do(world, "pause")
        world.clock.advance(timedelta(minutes=1))
        do(world, "resume", shift_anchor=True)
    assert next_dates(world, 3) == ["28 Feb 2026", "31 Mar 2026", "30 Apr 2026"]


def test_a_pause_that_moves_the_day_makes_another_day_the_wanted_one(world):
    world.subscribe("approved")
    world.tick()
    do(world, "pause")
    world.clock.advance(10 * DAY)
    do(world, "resume", shift_anchor=True)
    assert next_dates(world, 3) == ["10 Mar 2026", "10 Apr 2026", "10 May 2026"]


def test_a_kept_billing_day_moves_with_the_book(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", interval="quarter")
    with world.store.reading() as connection:
        record = record_from(stored.whole(connection, ["sub-1"])[0], world.vault)
    there = parse_record(record.as_json(with_token=True))
    assert there.digest == record.digest
    dates = [there.schedule.boundary(n) for n in range(2)]
    assert [f"{at:%d %b}" for at in dates] == ["28 Feb", "31 May"]


@pytest.mark.parametrize("anchor", ["2026-02-27", "2026-01-31"])
def test_a_billing_day_that_the_anchor_is_not_cut_from_is_refused(world, anchor):
    with pytest.raises(BadRecord, match="billing_day"):
        world.subscribe("approved", anchor_at=f"{anchor}T12:00:00Z", billing_day=31)


def test_a_new_amount_is_charged_from_the_next_period_on(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", amount="19.99")
    world.run_for(29 * DAY, step=DAY)
    assert [(i.amount_minor, i.status) for i in invoices(world)] == [(999, "paid"), (1999, "paid")]


def test_a_change_never_reaches_a_period_that_began_before_it_however_late_the_sweep(world):
    world.subscribe("approved", description="old")
    world.clock.advance(5 * DAY)
    do(world, "change", amount="19.99", description="new")
    world.tick()
    [first] = invoices(world)
    assert (first.amount_minor, first.description, first.status) == (999, "old", "paid")
    assert row(world).description == "new"


def test_a_new_interval_starts_a_series_at_the_next_period_and_the_numbers_go_on(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", interval="week")
    world.run_for(30 * DAY, step=DAY / 2)
    starts = [(i.reference_id, i.period_start.date().isoformat()) for i in invoices(world)]
    assert starts == [("sub-1-p0", "2026-01-31"), ("sub-1-p1", "2026-02-28")]
    world.run_for(8 * DAY, step=DAY / 2)
    assert invoices(world)[2].period_start.date().isoformat() == "2026-03-07"
    assert row(world).series_start == 1


def test_a_new_currency_keeps_the_31st_although_the_next_period_begins_on_the_28th(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", amount="500", currency="JPY")
    world.run_for(60 * DAY, step=DAY / 2)
    kept = [(i.currency, i.period_start.date().isoformat()) for i in invoices(world)]
    assert kept == [("USD", "2026-01-31"), ("JPY", "2026-02-28"), ("JPY", "2026-03-31")]


def test_a_change_of_interval_in_the_trial_counts_from_the_end_of_the_trial(world):
    trial_end = world.clock.now() + 10 * DAY
    world.subscribe("approved", trial_end=trial_end.isoformat())
    do(world, "change", interval="year")
    assert row(world).next_billing_at == trial_end
    world.run_for(10 * DAY, step=DAY)
    assert row(world).next_billing_at == trial_end.replace(year=2027)


def test_a_change_is_told_with_who_when_and_why(world):
    world.subscribe("approved")
    outcome = do(world, "change", amount="19.99")
    event = history(world)[-1]
    assert (event.kind, event.by, event.at) == ("subscription.changed", "operator:ann", START)
    assert event.data["why"] == "asked by phone"
    assert event.data["changes"] == {"amount": ["9.99 USD", "19.99 USD"]}
    assert outcome.details["from_period"] == 1  # period 0 had begun


@pytest.mark.parametrize(
    ("anchor", "interval"),
    [("0026-01-31T00:00:00Z", "year"), ("1926-01-31T00:00:00Z", "day"),
     ("2023-01-31T00:00:00Z", "day"), ("2020-12-31T00:00:00Z", "year")],
)  # fmt: skip
def test_a_start_so_long_ago_is_refused_by_field_and_opens_nothing(world, anchor, interval):
    done = world.subscribe("approved", anchor_at=anchor, interval=interval)
    assert done.outcomes == ("refused",)
    assert done.refused[0].field == "anchor_at"
    assert everything(world) == [[], [], [], []]


def test_an_old_start_is_welcome_with_what_was_charged_before(world):
    done = world.subscribe("approved", anchor_at="1926-01-31T00:00:00Z", interval="day",
                           paid_through=START.isoformat())  # fmt: skip
    assert done.outcomes == ("added",)
    world.subscribe("approved", anchor_at="1926-01-31T00:00:00Z", interval="day",
                    paid_through=START.isoformat())  # fmt: skip
    assert len(everything(world)[0]) == 1


def test_a_record_that_was_taken_once_is_unchanged_however_old_it_gets(world):
    terms = {"interval": "day", "anchor_at": START.isoformat()}
    world.subscribe("approved", **terms)
    world.clock.advance(2_000 * DAY)
    assert world.subscribe("approved", **terms).outcomes == ("unchanged",)


def test_a_decision_opens_no_more_periods_than_one_transaction_may_take(world):
    world.subscribe("approved", interval="day")
    world.tick()
    world.clock.advance(1_500 * DAY)
    with pytest.raises(InvalidInput, match="ask again"):
        do(world, "pause")
    assert len(invoices(world)) == 1
    world.tick()
    assert do(world, "pause").status == "paused"


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("change", {"amount": "19.99", "interval": "year"}),
        ("change", {"ends_at": "2027-01-31T12:00:00Z"}),
        ("pause", {}),
        ("cancel", {"at_period_end": False}),
        ("cancel", {"at_period_end": True}),
        ("end", {}),
    ],
)
def test_asking_twice_changes_nothing_the_second_time(world, what, options):
    world.subscribe("approved")
    world.tick()
    assert do(world, what, **options).outcome == "changed"
    before = everything(world)
    assert do(world, what, **options).outcome == "unchanged"
    assert everything(world) == before


def test_resuming_what_runs_and_keeping_what_is_not_cancelled_change_nothing(world):
    world.subscribe("approved")
    world.tick()
    before = everything(world)
    assert do(world, "resume", shift_anchor=True).outcome == "unchanged"
    assert do(world, "uncancel").outcome == "unchanged"
    assert everything(world) == before


@pytest.mark.parametrize(
    ("field", "terms"),
    [
        ("amount", {"amount": "9.999"}),
        ("amount", {"amount": "1.5", "currency": "JPY"}),
        ("amount", {"amount": "0"}),
        ("amount", {"amount": "-1"}),
        ("amount", {"amount": "1e9"}),
        ("amount", {"amount": "99999999999"}),
        ("amount", {"currency": "EUR"}),
        ("currency", {"amount": "1.00", "currency": "usd"}),
        ("currency", {"currency": "ZZZ"}),
        ("interval", {"interval": "fortnight"}),
        ("interval_count", {"interval_count": 0}),
        ("interval_count", {"interval": "day", "interval_count": -1}),
        ("description", {"description": "x" * 501}),
        ("catch_up", {"catch_up": "collect_all"}),
        ("ends_at", {"ends_at": "2026-01-31"}),
        ("ends_at", {"ends_at": "2026-02-28T12:00:00"}),
        ("ends_at", {"ends_at": "2026-02-28T12:00:00Z"}),
        ("ends_at", {"ends_at": "next year"}),
        ("by", {"amount": "1.00", "by": ""}),
        ("reference_id", {"amount": "1.00", "reference": "sub-2"}),
    ],
    ids=str,
)
def test_bad_terms_are_refused_by_field_and_change_nothing(world, field, terms):
    world.subscribe("approved")  # its first period is due, and not opened by a refused change
    before = everything(world)
    with pytest.raises(InvalidInput) as refused:
        do(world, "change", **terms)
    assert refused.value.field == field
    assert everything(world) == before


@pytest.mark.parametrize(
    ("first", "then", "options"),
    [
        ("cancel", "change", {"amount": "1.00"}),
        ("cancel", "pause", {}),
        ("cancel", "resume", {"shift_anchor": True}),
        ("cancel", "uncancel", {}),
        ("cancel", "end", {}),
        ("end", "cancel", {"at_period_end": True}),
        ("end", "pause", {}),
    ],
)
def test_what_is_over_stays_over(world, first, then, options):
    world.subscribe("approved")
    world.tick()
    do(world, first, **({"at_period_end": False} if first == "cancel" else {}))
    before = everything(world)
    with pytest.raises(InvalidInput) as refused:
        do(world, then, **options)
    assert refused.value.field == "status"
    assert everything(world) == before


def test_no_year_is_lost_to_months_that_were_charged_before_the_change_was_told_of(world):
    world.subscribe("approved")
    world.tick()
    made_at = world.clock.now() + DAY
    world.run_for(65 * DAY, step=DAY)  # charges those of 28 Feb and 31 Mar
    with pytest.raises(InvalidInput, match="2 periods of the old interval were charged since"):
        do(world, "change", interval="year", decided_at=made_at)
    do(world, "change", interval="year")
    world.run_for(800 * DAY, step=10 * DAY)
    assert world.debits() == {f"sub-1-p{number}": 1 for number in range(6)}
