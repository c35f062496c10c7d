"""Which late periods are collected, and when, without a database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up import (
    AGE_CAP,
    LATE_AFTER,
    MAX_PLANNED_PERIODS,
    Action,
    Diary,
    plan,
    plan_held,
)
from billing_worker.domain.catch_up_policy import DEFAULT_POLICY, Policy
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import Subscription, SubscriptionStatus

ANCHOR = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
POLICIES = [
    Policy.parse(text)
    for text in ("collect_latest", "collect_all:1", "collect_all:5", "forgive_older_than:9", "hold")
]


def subscription(unit=Unit.DAY, policy=DEFAULT_POLICY, number=1, **changes):
    fields = {
        "id": number, "reference_id": f"sub-{number}", "customer_id": 1, "card_id": 1,
        "status": SubscriptionStatus.ACTIVE, "money": Money.parse("9.99", "USD"),
        "schedule": Schedule(ANCHOR, unit, 1, "UTC"), "ends_after_periods": None,
        "next_period": 0, "next_billing_at": ANCHOR, "catch_up": policy,
    }  # fmt: skip
    return Subscription(**(fields | changes))


def planned(subscription, now, diary=None, **options):
    return plan(subscription, now, diary or Diary(), **options).planned


def actions(lines):
    return [line.action for line in lines]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_period_on_time_is_charged_at_once_whatever_the_policy(policy):
    [line] = planned(subscription(policy=policy), ANCHOR + LATE_AFTER)
    assert (line.action, line.rule, line.at) == (Action.COLLECT, "on_time", ANCHOR + LATE_AFTER)


def test_collect_latest_waives_every_period_but_the_last():
    lines = planned(subscription(), ANCHOR + 3.5 * DAY)
    assert actions(lines) == [Action.WAIVE] * 3 + [Action.COLLECT]
    assert "collect_latest" in lines[0].reason


def test_an_outage_shorter_than_the_interval_waives_nothing():
    lines = planned(subscription(Unit.MONTH), ANCHOR + 20 * DAY)
    assert actions(lines) == [Action.COLLECT]
    assert lines[0].at == ANCHOR + 20 * DAY


def test_hold_keeps_even_the_latest_period_when_it_is_late():
    assert actions(planned(subscription(policy=Policy.parse("hold")), ANCHOR + 1.5 * DAY)) == [
        Action.HOLD,
        Action.HOLD,
    ]


def test_forgive_waives_what_is_older_and_collects_the_rest_a_day_apart():
    lines = planned(subscription(policy=Policy.parse("forgive_older_than:2")), ANCHOR + 4.5 * DAY)
    assert actions(lines) == [Action.WAIVE] * 3 + [Action.COLLECT] * 2
    assert lines[4].at - lines[3].at >= DAY


def test_a_yearly_debt_of_half_a_year_is_not_revived():
    [line] = planned(subscription(Unit.YEAR), ANCHOR + 180 * DAY)
    assert (line.action, line.rule, line.at) == (Action.HOLD, "catch_up.age_cap", None)


def test_a_person_may_raise_the_age_cap():
    [line] = planned(subscription(Unit.YEAR), ANCHOR + 180 * DAY, age_cap=200 * DAY)
    assert line.action is Action.COLLECT


def test_a_debit_that_would_be_too_old_on_its_day_is_held():
    lines = planned(subscription(policy=Policy.parse("collect_all:5")), ANCHOR + 40.5 * DAY)
    assert {Action.COLLECT, Action.HOLD} == set(actions(lines))
    for line in lines:
        assert line.at is None or line.at - line.period.start <= AGE_CAP


def test_a_debit_made_yesterday_counts():
    now = ANCHOR + 40 * DAY
    late = subscription(Unit.MONTH, Policy.parse("collect_all:7"))
    lines = planned(late, now, Diary((now - DAY,)))
    assert lines[0].at == now + 6 * DAY


def test_a_cancellation_during_the_outage_ends_what_is_due():
    leaving = subscription(policy=Policy.parse("collect_all:1"), next_period=1,
                           next_billing_at=ANCHOR + DAY, cancels_at=ANCHOR + DAY)  # fmt: skip
    result = plan(leaving, ANCHOR + 5 * DAY, Diary())
    assert result.planned == ()
    assert result.after.status is SubscriptionStatus.CANCELLED


def test_periods_beyond_the_end_are_not_due():
    ending = subscription(policy=Policy.parse("collect_all:1"), ends_after_periods=2)
    result = plan(ending, ANCHOR + 5 * DAY, Diary())
    assert [line.period.number for line in result.planned] == [0, 1]
    assert result.after.status is SubscriptionStatus.ENDED


def test_one_go_takes_a_bounded_number_of_periods_and_the_next_one_continues():
    now = ANCHOR + (MAX_PLANNED_PERIODS + 10) * DAY
    first = plan(subscription(), now, Diary())
    second = plan(first.after, now, Diary())
    assert len(first.planned) == MAX_PLANNED_PERIODS
    assert set(actions(first.planned)) == {Action.WAIVE}
    assert actions(second.planned)[-1] is Action.COLLECT
    assert first.planned[-1].period.end == second.planned[0].period.start


def test_the_answer_for_periods_on_hold_is_the_policy_that_a_person_names():
    now = ANCHOR + 3.5 * DAY
    held = plan(subscription(policy=Policy.parse("hold")), now, Diary())
    periods = [line.period for line in held.planned]
    lines, _ = plan_held(
        periods,
        held.after.next_period - 1,
        held.after,
        now,
        Diary(),
        Policy.parse("collect_latest"),
    )
    assert actions(lines) == [Action.WAIVE] * 3 + [Action.COLLECT]


def test_held_periods_are_all_waived_by_collect_latest_when_a_later_one_was_billed():
    now = ANCHOR + 3.5 * DAY
    held = plan(subscription(policy=Policy.parse("hold")), now, Diary())
    periods = [line.period for line in held.planned[:-1]]
    lines, _ = plan_held(
        periods,
        held.after.next_period - 1,
        held.after,
        now,
        Diary(),
        Policy.parse("collect_latest"),
    )
    assert actions(lines) == [Action.WAIVE] * 3


@given(
    policy=st.sampled_from(POLICIES),
    unit=st.sampled_from([Unit.DAY, Unit.WEEK, Unit.MONTH]),
    minutes=st.integers(0, 400 * 24 * 60),
    paid=st.lists(st.integers(1, 20 * 24 * 60), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_every_due_period_gets_one_decision_and_late_debits_keep_their_distance(
    policy, unit, minutes, paid
):
    now = ANCHOR + timedelta(minutes=minutes)
    one = subscription(unit, policy)
    made = tuple(now - timedelta(minutes=ago) for ago in paid)
    result = plan(one, now, Diary(made))
    assert [line.period.number for line in result.planned] == list(range(result.after.next_period))
    assert result.after.next_billing_at > now
    dates = sorted(line.at for line in result.planned if line.at)
    late = sorted(line.at for line in result.planned if line.at and line.rule != "on_time")
    gap = timedelta(days=policy.days) if policy.rule == "collect_all" else DAY
    assert all(at >= now for at in dates)
    assert all(after - before >= gap for before, after in pairwise(late))
    assert all(at - other >= gap for at in late for other in made)
    for line in result.planned:
        assert (line.at is not None) == (line.action is Action.COLLECT)
        assert line.at is None or line.at - line.period.start <= AGE_CAP
        assert line.action is Action.COLLECT or line.reason
    for at in late:  # the agreed dates to come are not touched
        start, end = one.period(one.schedule.period_at(at))
        room = min(gap, (end - start) / 2)
        assert start < now - LATE_AFTER or at - start >= room
        assert end - at >= room


def test_daily_dates_leave_room_for_late_debits_half_way_between_them():
    now = ANCHOR + 3.5 * DAY
    lines = planned(subscription(policy=Policy.parse("collect_all:1")), now)
    assert [line.at - now for line in lines] == [0 * DAY, 1 * DAY, 2 * DAY, 3 * DAY]


@pytest.mark.parametrize(
    "text",
    ["", "collect", "collect_all", "collect_all:", "collect_all:0", "collect_all:-1", "hold:3",
     "collect_all:1.5", "forgive_older_than:366", "collect_all:٣", "collect_latest:"],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused_with_its_field(text):
    with pytest.raises(InvalidInput) as refused:
        Policy.parse(text)
    assert refused.value.field == "catch_up"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_reads_back_what_it_prints(policy):
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize("count", [0, 1, 199, 202, 5_000])
def test_any_number_of_debits_leaves_a_moment_that_keeps_the_distance_to_each(count):
    now = ANCHOR + timedelta(hours=2)
    made = tuple(now - timedelta(hours=1) + timedelta(seconds=n) for n in range(count))
    late = subscription(Unit.MONTH)
    [line] = planned(late, now, Diary(made))
    assert all(abs(line.at - debit) >= DAY for debit in made)
    assert line.at == (made[-1] + DAY if made else now)


def test_debits_in_any_order_are_kept_away_from():
    now = ANCHOR + 2 * DAY
    late = subscription(Unit.MONTH)
    made = (now + 2.5 * DAY, now - 0.5 * DAY, now + 1.2 * DAY)
    [line] = planned(late, now, Diary(made))
    assert line.at == now + 3.5 * DAY


def test_no_period_that_begins_at_the_agreed_end_is_due():
    ending = subscription(policy=Policy.parse("collect_all:1"), ends_at=ANCHOR + 2 * DAY)
    result = plan(ending, ANCHOR + 5 * DAY, Diary())
    assert [line.period.number for line in result.planned] == [0, 1]
    assert result.after.status is SubscriptionStatus.ENDED
