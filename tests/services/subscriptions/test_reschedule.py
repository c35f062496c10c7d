"""Goodwill days, another billing day and free periods: the next date moves, and never sooner."""

from __future__ import annotations

from datetime import timedelta

import pytest

from billing_worker.domain.catch_up_policy import Policy
from billing_worker.domain.errors import InvalidInput
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.forecast.preview import preview
from billing_worker.services.invoicing import catch_up
from billing_worker.services.invoicing.catch_up import Answer, Caps
from billing_worker.services.subscriptions import lifecycle
from tests.support.recovery import events

DAY = timedelta(days=1)


def move(world, **how):
    return lifecycle.reschedule(world.store, world.clock, "sub-1", by="ann", why="sorry", **how)


def foreseen(world, days=149):
    """The local days of the charges to come, by the preview."""
    now = world.clock.now()
    lines = preview(world.store, now, now + days * DAY)
    return [f"{one.at:%d %b} p{one.period}" for one in lines if one.reason is None]


@pytest.fixture
def monthly(world):
    """Paid for 31 Jan; next on 28 Feb."""
    world.subscribe("approved")
    world.tick()
    return world


@pytest.mark.parametrize(
    ("how", "dates"),
    [
        ({"days": 7}, ["07 Mar p1", "07 Apr p2", "07 May p3", "07 Jun p4"]),
        ({"billing_day": 15}, ["15 Mar p1", "15 Apr p2", "15 May p3", "15 Jun p4"]),
        ({"billing_day": 30}, ["28 Feb p1", "30 Mar p2", "30 Apr p3", "30 May p4"]),
        ({"billing_day": 28}, ["28 Feb p1", "28 Mar p2", "28 Apr p3", "28 May p4", "28 Jun p5"]),
        ({"billing_day": 31}, ["28 Feb p1", "31 Mar p2", "30 Apr p3", "31 May p4"]),
        ({"free_periods": 2}, ["30 Apr p3", "31 May p4"]),
    ],
    ids=str,
)
def test_the_next_dates_are_those_that_were_asked_for_and_the_preview_knows_them(
    monthly, how, dates
):
    move(monthly, **how)
    assert foreseen(monthly) == dates
    monthly.run_for(149 * DAY, step=DAY)
    charged = [f"sub-1-{date.split()[-1]}" for date in dates]
    assert monthly.debits() == {"sub-1-p0": 1} | dict.fromkeys(charged, 1)


def test_the_history_says_what_was_given_by_whom_and_why(monthly):
    move(monthly, free_periods=2)
    [told] = events(monthly, "subscription.changed")
    assert told["free_periods"] == [1, 2]
    assert told["next_period_begins"].startswith("2026-04-30")
    assert told["why"] == "sorry"


def test_a_command_moves_the_date_once_however_often_it_comes(monthly):
    asked = {"reference_id": "week-1", "subscription": "sub-1", "days": 7}
    answers = [carry_out(monthly.ports, Message("billing.reschedule", asked)) for _ in range(2)]
    assert [answer.status for answer in answers] == ["done", "unchanged"]
    assert foreseen(monthly, 40) == ["07 Mar p1"]


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({}, "days"),
        ({"days": 7, "billing_day": 3}, "days"),
        ({"days": 0}, "days"),
        ({"days": 400}, "days"),
        ({"billing_day": 32}, "billing_day"),
        ({"free_periods": 0}, "free_periods"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_field(monthly, how, field):
    with pytest.raises(InvalidInput) as refused:
        move(monthly, **how)
    assert refused.value.field == field


def test_no_instalment_is_given_for_nothing_but_it_may_come_later(world):
    world.subscribe("approved", ends_after_periods=3)
    world.tick()
    with pytest.raises(InvalidInput, match="each of which is owed"):
        move(world, free_periods=1)
    move(world, days=7)
    world.run_for(100 * DAY, step=DAY)
    assert world.debits().total() == 3


def test_a_date_of_what_is_paused_or_about_to_be_cancelled_cannot_be_moved(monthly):
    lifecycle.cancel(monthly.store, monthly.clock, "sub-1", at_period_end=True, by="ann")
    with pytest.raises(InvalidInput, match="withdraw the cancellation first"):
        move(monthly, days=7)
    lifecycle.uncancel(monthly.store, monthly.clock, "sub-1", by="ann")
    lifecycle.pause(monthly.store, monthly.clock, "sub-1", by="ann")
    with pytest.raises(InvalidInput, match="is paused"):
        move(monthly, days=7)


def test_free_periods_that_are_told_of_late_stay_free_when_a_second_decision_is_told_of(monthly):
    made_at = monthly.clock.now() + DAY
    monthly.clock.advance(60 * DAY)
    monthly.sweep()  # opens those of 28 Feb and 31 Mar, and charges none
    move(monthly, free_periods=2, decided_at=made_at)
    lifecycle.change(
        monthly.store, monthly.clock, "sub-1", description="x", by="ann", decided_at=made_at + DAY
    )
    monthly.run_for(40 * DAY, step=DAY)
    assert monthly.debits() == {"sub-1-p0": 1, "sub-1-p3": 1}


@pytest.mark.parametrize("skipped_by", ["free periods", "a pause"])
def test_the_latest_held_period_is_collected_where_later_numbers_were_skipped(world, skipped_by):
    world.subscribe("approved", catch_up="hold")
    world.tick()
    world.clock.advance(62 * DAY)
    world.tick()  # holds those of 28 Feb and 31 Mar
    if skipped_by == "a pause":
        lifecycle.pause(world.store, world.clock, "sub-1", by="ann")
        world.clock.advance(40 * DAY)
        lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="ann")
    else:
        move(world, free_periods=2)
    answer = Answer(Policy.parse("collect_latest"))
    catch_up.apply(world.store, world.clock, answer, Caps(), by="ann")
    world.tick()
    assert [world.fate(f"sub-1-p{n}") for n in (1, 2)] == ["void", "paid"]
