"""The ladder, without database, gateway or clock."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_worker.domain.attempt import Origin
from billing_worker.domain.calendar import local_hour_after
from billing_worker.domain.declines import DECLINES, DeclineClass
from billing_worker.domain.dunning import (
    DEFAULT,
    POLICIES,
    Declined,
    End,
    Policy,
    Turn,
    after_decline,
    policy_named,
    steps_used,
)

START = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
DAY = timedelta(days=1)
PLAIN = Policy("plain", (2, 5, 7, 7), "test", max_age=timedelta(days=365))
SOFT = "insufficient_funds"


def declined(resolution=SOFT, origin=Origin.SCHEDULED, at=START):
    return Declined(origin, at, resolution)


def decide(*declines, policy=PLAIN, tz="UTC", **facts):
    return after_decline(policy, declines, tz, **facts)


def climb(policy, *, tz="UTC", start=START, resolution=SOFT):
    """The instants of all attempts when every one of them is refused."""
    declines = [declined(resolution, at=start)]
    while (step := decide(*declines, policy=policy, tz=tz)).at is not None:
        declines.append(declined(resolution, step.origin, step.at))
    return [one.at for one in declines], step


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_days_count_from_the_previous_attempt(policy):
    attempts, end = climb(replace(policy, hour=None))
    waits = [(after - before).days for before, after in pairwise(attempts)]
    assert tuple(waits) == policy.delays_days
    assert (end.turn, end.rule) == (Turn.NOBODY, "ladder.used_up")


def test_the_default_ladder_is_polars_and_ends_in_suspension():
    assert (DEFAULT.delays_days, DEFAULT.end) == ((2, 5, 7, 7), End.SUSPEND)
    assert policy_named(None) is policy_named("a policy that was removed") is DEFAULT


def test_attempts_come_at_the_preferred_hour_of_the_customers_clock():
    attempts, _ = climb(PLAIN, tz="America/New_York", start=datetime(2026, 3, 1, 3, 0, tzinfo=UTC))
    zone = ZoneInfo("America/New_York")
    assert {moment.astimezone(zone).hour for moment in attempts[1:]} == {9}
    # New York changed its clocks on March 8: the same wall time is another hour in UTC.
    assert {moment.hour for moment in attempts[1:]} == {14, 13}


@pytest.mark.parametrize("seconds", [0, 3, 3599])
def test_an_attempt_a_little_after_the_hour_does_not_make_it_a_day_more(seconds):
    late = START + timedelta(seconds=seconds)
    assert decide(declined(at=late)).at == START + 2 * DAY


ZONES = ("UTC", "Asia/Kathmandu", "America/St_Johns", "Australia/Lord_Howe", "Pacific/Apia")
INSTANTS = st.integers(0, 15 * 365 * 86_400).map(lambda seconds: START + timedelta(seconds=seconds))


@given(INSTANTS, st.integers(1, 30), st.integers(0, 23), st.sampled_from(ZONES))
def test_the_nearest_hour_is_within_half_a_day_of_the_days_that_were_asked_for(
    instant, days, hour, tz
):
    at = local_hour_after(instant, days, hour, tz)
    assert at.astimezone(ZoneInfo(tz)).hour in {hour, (hour + 1) % 24}  # or past a gap
    # Clocks move by an hour at most between the two.
    assert abs(at - instant - timedelta(days=days)) <= timedelta(hours=13)


@pytest.mark.parametrize("origin", [Origin.MANUAL, Origin.NEW_CARD, Origin.LINK, Origin.BACKUP])
def test_an_attempt_that_somebody_asked_for_uses_no_step_and_moves_no_date(origin):
    first = declined()
    planned = decide(first)
    asked = decide(first, declined(origin=origin, at=START + timedelta(hours=1)))
    assert (asked.at, asked.rule, asked.origin) == (planned.at, planned.rule, Origin.DUNNING)


def test_a_card_that_just_refused_is_left_alone_for_a_day_whoever_asked_it():
    evening = START + timedelta(days=1, hours=23)
    step = decide(declined(), declined(origin=Origin.MANUAL, at=evening))
    assert decide(declined()).at == START + 2 * DAY
    assert step.at == START + 3 * DAY


def test_an_outage_of_days_does_not_bunch_the_steps():
    late = START + 20 * DAY
    step = decide(declined(), declined(origin=Origin.DUNNING, at=late))
    assert step.at == late + 5 * DAY


@pytest.mark.parametrize("code", [code for code, row in DECLINES.items() if row.once])
def test_a_low_cap_code_is_retried_once_and_then_needs_another_card(code):
    first = decide(declined(code))
    second = decide(declined(code), declined(code, Origin.DUNNING, first.at))
    assert first.turn is Turn.OURS
    assert (second.turn, second.at) == (Turn.CARD, None)
    assert not second.kills_card


ASKED = [Origin.MANUAL, Origin.NEW_CARD, Origin.LINK, Origin.BACKUP]


@pytest.mark.parametrize("origin", ASKED)
@pytest.mark.parametrize("code", ["issuer_decline", "fatal_error"])
def test_what_somebody_asked_for_does_not_take_the_ladders_one_retry(origin, code):
    asked = declined(code, origin, START + timedelta(hours=1))
    step = decide(declined(), asked, declined(code, Origin.DUNNING, START + 2 * DAY))
    assert step.turn is Turn.OURS
    last = declined(code, Origin.DUNNING, START + 7 * DAY)
    after_two = decide(declined(), asked, declined(code, Origin.DUNNING, START + 2 * DAY), last)
    assert after_two.turn is not Turn.OURS


HARD = [code for code, row in DECLINES.items() if row.kind is DeclineClass.HARD]


@pytest.mark.parametrize("code", HARD)
def test_a_hard_decline_kills_the_card_and_asks_for_another(code):
    step = decide(declined(code))
    assert (step.turn, step.at, step.kills_card) == (Turn.CARD, None, True)
    assert step.gives_up_at == START + PLAIN.max_age


def test_a_hard_decline_goes_to_the_backup_card_at_once_when_there_is_one():
    step = decide(declined("card_is_stolen"), other_card=Origin.BACKUP)
    assert (step.at, step.origin, step.kills_card) == (START, Origin.BACKUP, True)


def test_no_other_decline_touches_the_backup_card():
    for code, row in DECLINES.items():
        if row.kind is not DeclineClass.HARD:
            assert decide(declined(code), other_card=Origin.BACKUP).origin is not Origin.BACKUP


def test_a_card_that_was_replaced_while_the_old_one_was_asked_is_tried_at_once():
    step = decide(declined(), other_card=Origin.NEW_CARD)
    assert (step.at, step.origin) == (START, Origin.NEW_CARD)


def test_what_may_have_been_paid_is_never_tried_again_by_itself_whatever_card_there_is():
    for code, row in DECLINES.items():
        if row.kind is DeclineClass.UNKNOWN:
            step = decide(declined(code), other_card=Origin.NEW_CARD)
            assert (step.turn, step.at) == (Turn.PERSON, None)
    assert decide(declined("never_documented")).turn is Turn.PERSON


def test_a_technical_decline_is_retried_the_next_day_and_then_goes_to_a_person():
    first = decide(declined("fatal_error"))
    assert first.at == START + DAY
    second = decide(declined("fatal_error"), declined("timeout", Origin.DUNNING, first.at))
    assert (second.turn, second.at) == (Turn.PERSON, None)


def test_a_refused_configuration_pauses_the_service_and_uses_up_no_step():
    first = declined()
    step = decide(first, declined("invalid_credentials", Origin.DUNNING, START + 2 * DAY))
    assert (step.turn, step.origin, step.pauses_service) == (Turn.OURS, Origin.DUNNING, True)
    assert steps_used([first, declined("invalid_credentials", Origin.DUNNING)]) == 0


def test_a_customer_step_is_waited_for_and_not_retried():
    step = decide(declined("auth_3ds_required"))
    assert (step.turn, step.at) == (Turn.CUSTOMER, None)
    assert step.gives_up_at is not None


def test_a_network_code_that_says_never_makes_a_soft_decline_a_hard_one():
    step = decide(declined("issuer_decline"), never="visa.category_1_never")
    assert (step.turn, step.kills_card, step.rule) == (Turn.CARD, True, "visa.category_1_never")


def test_the_ladder_is_cut_by_age_and_by_attempts():
    assert len(climb(replace(PLAIN, max_age=timedelta(days=10)))[0]) == 3
    attempts, end = climb(replace(PLAIN, max_attempts=2))
    assert len(attempts) == 2
    assert end.rule == "ladder.used_up"


CODES = st.sampled_from([SOFT, "limit_violation", "declined", "fatal_error", "invalid_credentials"])
ASKED_FOR = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(
    [Origin.MANUAL, Origin.NEW_CARD, Origin.LINK, Origin.BACKUP])), max_size=6)  # fmt: skip


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), CODES, ASKED_FOR,
       st.sampled_from([None, 0, 9, 23]), st.sampled_from(["UTC", "Pacific/Auckland"]))  # fmt: skip
def test_every_step_is_used_at_most_once_and_in_order_whatever_comes_between(
    delays, code, asked_for, hour, tz
):
    policy = Policy("any", tuple(delays), "test", hour, 20, timedelta(days=365))
    declines = [declined(code)]
    manual = sorted((START + timedelta(hours=hours), origin) for hours, origin in asked_for)
    used = []
    while (step := decide(*declines, policy=policy, tz=tz)).at is not None and len(used) < 50:
        assert step.at > declines[-1].at
        if manual and manual[0][0] < step.at:
            at, origin = manual.pop(0)
            declines.append(declined(code, origin, max(at, declines[-1].at + timedelta(hours=1))))
            continue
        declines.append(declined(SOFT if step.pauses_service else code, step.origin, step.at))
        if step.origin is Origin.DUNNING and not step.pauses_service:
            used.append(int(step.rule.rpartition(" ")[2]))
        code = SOFT if step.pauses_service else code
    assert used == list(range(1, len(used) + 1))
    assert len(used) <= len(delays)
