"""The calendar's promises, held against every zone of the tz database and every change in it."""

from __future__ import annotations

import random
import struct
import time
import zoneinfo
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_worker.domain.calendar import (
    MAX_COUNT,
    Interval,
    Schedule,
    Unit,
    boundary,
    period_at,
)
from billing_worker.domain.errors import InvalidInput

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
TICK = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ZONES = sorted(zoneinfo.available_timezones())

schedules = st.builds(
    Schedule,
    anchor=st.datetimes(
        min_value=datetime(1800, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone.
        max_value=datetime(2200, 1, 1),  # noqa: DTZ001
        timezones=st.just(UTC),
    ),
    unit=st.sampled_from(Unit),
    count=st.integers(min_value=1, max_value=5),
    tz=st.sampled_from(ZONES),
)
instants = st.datetimes(
    min_value=datetime(1600, 1, 1),  # noqa: DTZ001
    max_value=datetime(2600, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
)
numbers = st.integers(min_value=-300, max_value=300)
# Loading a zone's file takes its time once; the first example is no slower a rule for it.
unhurried = settings(deadline=None, max_examples=200)


def at(text):
    return datetime.fromisoformat(text)


# --- Any schedule ---------------------------------------------------------------------------------


@unhurried
@given(schedule=schedules, n=numbers)
def test_boundaries_strictly_increase(schedule, n):
    assert schedule.boundary(n) < schedule.boundary(n + 1)


@unhurried
@given(schedule=schedules, n=numbers)
def test_the_instant_of_a_boundary_belongs_to_the_period_it_opens(schedule, n):
    opening = schedule.boundary(n)
    assert schedule.period_at(opening) == n
    assert schedule.period_at(opening - TICK) == n - 1


@unhurried
@given(schedule=schedules, instant=instants)
def test_every_instant_lies_inside_the_period_it_is_said_to_belong_to(schedule, instant):
    start, end = schedule.period(schedule.period_at(instant))
    assert start <= instant < end


@unhurried
@given(schedule=schedules)
def test_the_first_period_begins_at_the_anchor_itself(schedule):
    assert schedule.boundary(0) == schedule.anchor


@unhurried
@given(schedule=schedules, n=numbers.filter(bool))
def test_a_boundary_is_the_anchors_wall_clock_plus_n_intervals(schedule, n):
    # An oracle of its own: days by ordinal, months by walking them one at a time.
    wall = schedule.anchor.astimezone(ZoneInfo(schedule.tz)).replace(tzinfo=None, fold=0)
    expected = _slow_wall(wall, schedule.unit, n * schedule.count)
    found = schedule.boundary(n).astimezone(ZoneInfo(schedule.tz)).replace(tzinfo=None)
    if _exists(expected, schedule.tz):
        assert found == expected
    else:
        assert abs(found - expected) <= DAY


@unhurried
@given(schedule=schedules, n=numbers)
def test_asking_for_other_boundaries_first_changes_nothing(schedule, n):
    alone = boundary(schedule.anchor, schedule.unit, schedule.count, n, schedule.tz)
    for other in (n - 1, n + 1, 0):
        schedule.boundary(other)
    assert schedule.boundary(n) == alone


@unhurried
@given(schedule=schedules, instant=instants)
def test_the_first_period_from_an_instant_is_the_earliest_that_has_not_begun(schedule, instant):
    n = schedule.first_period_from(instant)
    assert n >= 0
    assert schedule.boundary(n) >= instant
    assert n == 0 or schedule.boundary(n - 1) < instant


@unhurried
@given(schedule=schedules, n=st.integers(min_value=0, max_value=300))
def test_who_has_paid_exactly_through_a_boundary_is_charged_at_it(schedule, n):
    assert schedule.first_period_from(schedule.boundary(n)) == n


@unhurried
@given(schedule=schedules, n=numbers, hours=st.integers(min_value=-12, max_value=14))
def test_the_offset_an_anchor_was_written_with_does_not_matter(schedule, n, hours):
    elsewhere = schedule.anchor.astimezone(timezone(timedelta(hours=hours)))
    same = Schedule(elsewhere, schedule.unit, schedule.count, schedule.tz)
    assert same == schedule
    assert same.boundary(n) == schedule.boundary(n)


@unhurried
@given(schedule=schedules, instant=instants)
def test_the_plain_functions_agree_with_the_schedule(schedule, instant):
    arguments = (schedule.anchor, schedule.unit, schedule.count)
    n = period_at(*arguments, schedule.tz, instant)
    assert n == schedule.period_at(instant)
    assert boundary(*arguments, n, schedule.tz) == schedule.boundary(n)


@unhurried
@given(schedule=schedules, n=numbers)
def test_every_boundary_is_given_in_utc(schedule, n):
    assert schedule.boundary(n).tzinfo is UTC


# --- Month ends and leap days ---------------------------------------------------------------------


@pytest.mark.parametrize("day", range(1, 32))
@pytest.mark.parametrize("unit", [Unit.MONTH, Unit.QUARTER, Unit.YEAR])
def test_the_day_is_the_anchors_or_the_months_last_for_400_years_either_way(unit, day):
    schedule = Schedule(datetime(2000, 1, day, tzinfo=UTC), unit, 1, "UTC")
    per_year = {Unit.MONTH: 12, Unit.QUARTER: 4, Unit.YEAR: 1}[unit]
    numbers = {
        n for year in range(-400, 401, 7) for n in range(year * per_year, year * per_year + 2)
    }
    for n in numbers:
        found = schedule.boundary(n)
        is_last_of_month = (found + DAY).day == 1
        assert found.day == day or (found.day < day and is_last_of_month)
        assert (found.year * 12 + found.month) - (2000 * 12 + 1) == n * 12 // per_year


@pytest.mark.parametrize("year", range(2024, 2424))
def test_a_leap_day_returns_in_every_leap_year_of_a_whole_gregorian_cycle(year):
    is_leap = (datetime(year, 3, 1, tzinfo=UTC) - DAY).day == 29
    found = boundary(datetime(2024, 2, 29, tzinfo=UTC), Unit.YEAR, 1, year - 2024, "UTC")
    assert (found.year, found.month, found.day) == (year, 2, 29 if is_leap else 28)


def test_the_31st_is_not_dragged_down_by_february():
    january_31 = at("2026-01-31T00:00:00Z")
    days = [boundary(january_31, Unit.MONTH, 1, n, "UTC").date().isoformat() for n in range(5)]
    assert days == ["2026-01-31", "2026-02-28", "2026-03-31", "2026-04-30", "2026-05-31"]


def test_numbers_below_zero_count_back_from_the_anchor():
    march_31 = at("2024-03-31T12:00:00Z")
    assert boundary(march_31, Unit.MONTH, 1, -1, "UTC") == at("2024-02-29T12:00:00Z")
    assert boundary(march_31, Unit.MONTH, 1, -2, "UTC") == at("2024-01-31T12:00:00Z")


@unhurried
@given(schedule=schedules, instant=instants)
def test_as_many_whole_intervals_fit_between_two_times_as_it_takes_to_pass_none(schedule, instant):
    interval, start = schedule.interval, schedule.anchor.replace(tzinfo=None)
    wall = instant.replace(tzinfo=None)
    n = interval.whole_between(start, wall)
    assert interval.after(start, n) <= wall < interval.after(start, n + 1)


# --- Clocks that are moved ------------------------------------------------------------------------


def test_the_hour_on_the_customers_clock_survives_summer_time():
    daily = Schedule(at("2026-03-07T09:00:00-05:00"), Unit.DAY, 1, "America/New_York")
    assert daily.boundary(1) == at("2026-03-08T09:00:00-04:00")
    assert daily.boundary(1) - daily.boundary(0) == 23 * HOUR


def test_a_time_the_clocks_jumped_over_moves_forward_by_the_jump():
    daily = Schedule(at("2026-03-07T02:30:00-05:00"), Unit.DAY, 1, "America/New_York")
    assert daily.boundary(1) == at("2026-03-08T03:30:00-04:00")
    assert daily.boundary(2) == at("2026-03-09T02:30:00-04:00")


def test_a_time_that_occurs_twice_means_the_first():
    daily = Schedule(at("2026-10-31T01:30:00-04:00"), Unit.DAY, 1, "America/New_York")
    assert daily.boundary(1) == at("2026-11-01T01:30:00-04:00")
    assert daily.boundary(2) == at("2026-11-02T01:30:00-05:00")


@pytest.mark.parametrize("unit", Unit)
def test_an_anchor_in_the_second_of_two_equal_hours_opens_the_first_period_there(unit):
    second = at("2026-11-01T01:30:00-05:00")
    schedule = Schedule(second, unit, 1, "America/New_York")
    assert schedule.boundary(0) == second
    assert schedule.period_at(second - TICK) == -1


def test_a_monthly_boundary_in_a_repeated_hour_is_the_first_even_from_a_second_hour_anchor():
    # Nov 1 2026 and Nov 1 2037 both end summer time in New York: 132 months apart.
    monthly = Schedule(at("2026-11-01T01:30:00-05:00"), Unit.MONTH, 1, "America/New_York")
    assert monthly.boundary(132) == at("2037-11-01T01:30:00-04:00")


def test_an_anchor_written_as_a_time_that_does_not_exist_means_the_instant_it_names():
    nonexistent = datetime(2026, 3, 8, 2, 30, tzinfo=ZoneInfo("America/New_York"))
    daily = Schedule(nonexistent, Unit.DAY, 1, "America/New_York")
    assert daily.boundary(0) == at("2026-03-08T03:30:00-04:00")
    assert daily.boundary(1) == at("2026-03-09T03:30:00-04:00")


def test_old_local_mean_time_is_kept_to_the_second():
    yearly = Schedule(at("1880-06-01T00:00:00Z"), Unit.YEAR, 1, "Europe/Amsterdam")
    old, new = yearly.boundary(0), yearly.boundary(100)
    shown = [one.astimezone(ZoneInfo("Europe/Amsterdam")).time() for one in (old, new)]
    assert shown[0] == shown[1]
    assert old.second != new.second


# --- Days that never were -------------------------------------------------------------------------

SKIPPED_DAYS = [
    ("Pacific/Apia", "2011-12-30"),
    ("Pacific/Fakaofo", "2011-12-30"),
    ("Pacific/Kiritimati", "1994-12-31"),
    ("Pacific/Enderbury", "1994-12-31"),
    ("Pacific/Kwajalein", "1993-08-21"),
    ("Asia/Manila", "1844-12-31"),
]
HOURS_OF_THE_DAY = ["00:00:00", "00:00:01", "06:30:00", "12:00:00", "23:59:59.999999"]


@pytest.mark.parametrize("hour", HOURS_OF_THE_DAY)
@pytest.mark.parametrize(("tz", "day"), SKIPPED_DAYS)
def test_a_daily_boundary_on_a_skipped_day_lies_half_way_between_its_neighbours(tz, day, hour):
    before, skipped, after = _around(tz, day, hour, unit=Unit.DAY, count=1)
    assert after - before == DAY
    assert skipped - before == after - skipped == DAY / 2


@pytest.mark.parametrize("hour", HOURS_OF_THE_DAY)
@pytest.mark.parametrize(("tz", "day"), SKIPPED_DAYS)
@pytest.mark.parametrize(("unit", "count"), [(Unit.DAY, 2), (Unit.WEEK, 1), (Unit.YEAR, 1)])
def test_any_longer_interval_moves_a_skipped_day_forward_by_the_whole_gap(
    tz, day, hour, unit, count
):
    _, skipped, _ = _around(tz, day, hour, unit=unit, count=count)
    shown = skipped.astimezone(ZoneInfo(tz)).replace(tzinfo=None)
    assert shown == at(f"{day}T{hour}") + DAY


@pytest.mark.parametrize(("tz", "day"), SKIPPED_DAYS)
def test_days_after_a_skipped_day_keep_the_number_the_calendar_gives_them(tz, day):
    anchor = (at(f"{day}T10:00:00") - 10 * DAY).replace(tzinfo=ZoneInfo(tz))
    daily = Schedule(anchor, Unit.DAY, 1, tz)
    assert daily.boundary(30).astimezone(ZoneInfo(tz)).date() == anchor.date() + 30 * DAY


def test_a_day_lived_twice_is_one_period_of_48_hours():
    # Samoa crossed the date line the other way in 1892 and lived through July 4 twice.
    daily = Schedule(at("1892-07-01T12:00:00Z"), Unit.DAY, 1, "Pacific/Apia")
    lengths = [daily.boundary(n + 1) - daily.boundary(n) for n in range(6)]
    assert sorted(lengths) == [DAY] * 5 + [2 * DAY]


# --- Every zone, around every kind of change it ever made ------------------------------------------


def test_no_zone_ever_moved_its_clocks_by_more_than_a_day():
    """period_at corrects its guess by one, and a skipped day by 12 h: both rest on this."""
    jumps = {
        abs(_offset(instant, tz) - _offset(instant - TICK, tz))
        for tz in ZONES
        for instant in _changes(tz)
    }
    assert max(jumps) == DAY


@pytest.mark.parametrize("prefix", sorted({tz[:2] for tz in ZONES}))
def test_no_change_of_any_zones_clock_breaks_a_promise(prefix):
    dice = random.Random(prefix)
    for tz in (tz for tz in ZONES if tz[:2] == prefix):
        for change in _sampled_changes(tz, dice):
            _check_promises_around(change, tz, dice)


def _check_promises_around(change, tz, dice):
    """Let a boundary fall before, into and after the moved hours, for short and long intervals."""
    for unit, count, periods_ahead in [
        (Unit.DAY, 1, 2),
        (Unit.DAY, 1, 0),
        (Unit.DAY, 2, 1),
        (Unit.WEEK, 1, 1),
        (Unit.MONTH, 1, 1),
        (Unit.YEAR, 1, -1),
    ]:
        near = change + dice.uniform(-1.05, 1.05) * DAY
        anchor = Interval(unit, count).after(near, -periods_ahead)
        schedule = Schedule(anchor, unit, count, tz)
        numbers = range(periods_ahead - 2, periods_ahead + 4)
        boundaries = [schedule.boundary(n) for n in numbers]
        assert all(a < b for a, b in pairwise(boundaries)), (schedule, boundaries)
        for n, opening in zip(numbers, boundaries, strict=True):
            assert schedule.period_at(opening) == n, (schedule, n)
            assert schedule.period_at(opening - TICK) == n - 1, (schedule, n)


def _sampled_changes(tz, dice):
    """The largest jumps of the zone, its first and last change, and a few of the others."""
    changes = _changes(tz)
    by_size = sorted(changes, key=lambda i: abs(_offset(i, tz) - _offset(i - TICK, tz)))
    return {*by_size[-3:], *changes[:1], *changes[-1:], *dice.sample(changes, min(4, len(changes)))}


# --- What a schedule refuses ----------------------------------------------------------------------

ANCHOR = at("2026-01-31T00:00:00Z")


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1, 1.0, True, "1", None])
def test_an_interval_count_that_is_not_a_whole_number_in_range_is_refused(count):
    assert _refused_field(ANCHOR, Unit.MONTH, count, "UTC") == "interval_count"


@pytest.mark.parametrize("unit", ["", "months", "Month", "hour", "fortnight", None, 1, []])
def test_an_unknown_interval_is_refused(unit):
    assert _refused_field(ANCHOR, unit, 1, "UTC") == "interval"


@pytest.mark.parametrize(
    "anchor",
    [
        ANCHOR.replace(tzinfo=None),
        "2026-01-31T00:00:00Z",
        ANCHOR.date(),
        1767225600,
        None,
        datetime.min.replace(tzinfo=timezone(14 * HOUR)),
        datetime.max.replace(tzinfo=timezone(-12 * HOUR)),
    ],
)
def test_an_anchor_without_an_offset_or_beyond_all_calendars_is_refused(anchor):
    assert _refused_field(anchor, Unit.MONTH, 1, "UTC") == "anchor_at"


@pytest.mark.parametrize(
    ("anchor", "tz"),
    [
        (datetime.min.replace(tzinfo=UTC), "America/New_York"),
        (datetime.max.replace(tzinfo=UTC), "Asia/Tokyo"),
    ],
)
def test_an_anchor_beyond_the_calendar_of_its_own_zone_is_refused(anchor, tz):
    assert _refused_field(anchor, Unit.MONTH, 1, tz) == "anchor_at"


@pytest.mark.parametrize(
    "tz",
    [
        *[
            "",
            "Mars/Base",
            "utc",
            "Europe",
            "Europe/Berlin ",
            "+02:00",
            "zone.tab",
            "\0",
            "x" * 300,
        ],
        *["../../etc/passwd", "/etc/localtime", "..", None, 5, [], b"UTC"],
    ],
)
def test_an_unknown_zone_is_refused(tz):
    assert _refused_field(ANCHOR, Unit.MONTH, 1, tz) == "timezone"


@pytest.mark.parametrize("n", [10**5, -(10**5), 10**30, -(10**30), 95_689])
@pytest.mark.parametrize("unit", [Unit.MONTH, Unit.WEEK, Unit.YEAR])
def test_a_boundary_outside_the_years_1_to_9999_is_an_error_a_caller_can_name(unit, n):
    schedule = Schedule(ANCHOR, unit, 12, "Asia/Tokyo")
    with pytest.raises(InvalidInput) as refusal:
        schedule.boundary(n)
    assert refusal.value.field == "period"


def test_the_last_boundary_of_the_year_9999_can_still_be_asked_for():
    monthly = Schedule(ANCHOR, Unit.MONTH, 1, "UTC")
    assert monthly.boundary((9999 - 2026) * 12 + 11) == at("9999-12-31T00:00:00Z")
    with pytest.raises(InvalidInput):
        monthly.period((9999 - 2026) * 12 + 11)


@pytest.mark.parametrize(
    ("instant", "field"),
    [
        (ANCHOR.replace(tzinfo=None), "instant"),
        (datetime.max.replace(tzinfo=UTC), "instant"),
        (datetime.min.replace(tzinfo=timezone(14 * HOUR)), "instant"),
        (at("9999-12-31T12:00:00Z"), "period"),
    ],
)
def test_an_instant_that_no_period_can_hold_is_refused(instant, field):
    with pytest.raises(InvalidInput) as refusal:
        Schedule(ANCHOR, Unit.MONTH, 1, "Asia/Tokyo").period_at(instant)
    assert refusal.value.field == field


def test_an_instant_before_the_first_boundary_of_all_calendars_is_refused():
    with pytest.raises(InvalidInput) as refusal:
        Schedule(ANCHOR, Unit.YEAR, 12, "UTC").period_at(at("0001-06-01T00:00:00Z"))
    assert refusal.value.field == "instant"


def test_the_largest_interval_count_is_still_accepted():
    assert boundary(ANCHOR, Unit.MONTH, MAX_COUNT, 1, "UTC") == at("2109-05-31T00:00:00Z")


def test_an_interval_may_be_given_by_its_plain_name():
    assert Schedule(ANCHOR, "month", 1, "UTC") == Schedule(ANCHOR, Unit.MONTH, 1, "UTC")
    assert Schedule(ANCHOR, "month", 1, "UTC").unit is Unit.MONTH


# --- Speed ----------------------------------------------------------------------------------------


@pytest.mark.benchmark
def test_boundaries_per_second_on_one_core():
    schedules = {unit: Schedule(ANCHOR, unit, 1, "America/New_York") for unit in Unit}
    for unit, schedule in schedules.items():
        rates = {
            "Schedule.boundary": _rate(lambda n, s=schedule: s.boundary(n)),
            "boundary": _rate(lambda n, u=unit: boundary(ANCHOR, u, 1, n, "America/New_York")),
            "Schedule.period_at": _rate(lambda n, s=schedule: s.period_at(ANCHOR + n * DAY)),
        }
        print(unit, *(f"{name} {rate:,.0f}/s" for name, rate in rates.items()), sep="  ")


def _rate(call, numbers=range(1, 401), rounds=20):
    """Calls a second in the quietest of some rounds: a busy neighbour only makes it slower."""

    def once():
        begin = time.perf_counter()
        for n in numbers:
            call(n)
        return len(numbers) / (time.perf_counter() - begin)

    return max(once() for _ in range(rounds))


# --- Helpers --------------------------------------------------------------------------------------


def _refused_field(anchor, unit, count, tz):
    with pytest.raises(InvalidInput) as refusal:
        Schedule(anchor, unit, count, tz)
    return refusal.value.field


def _around(tz, day, hour, *, unit, count):
    """The boundaries before, on and after `day` of a schedule that has one on it."""
    start = Interval(unit, count).after(at(f"{day}T{hour}"), -1).replace(tzinfo=ZoneInfo(tz))
    schedule = Schedule(start, unit, count, tz)
    return [schedule.boundary(n) for n in range(3)]


def _slow_wall(wall, unit, count):
    if unit in {Unit.DAY, Unit.WEEK}:
        days = count * (7 if unit is Unit.WEEK else 1)
        return datetime.combine(wall.fromordinal(wall.toordinal() + days), wall.time())
    months = count * {Unit.MONTH: 1, Unit.QUARTER: 3, Unit.YEAR: 12}[unit]
    first = wall.replace(day=1)
    for _ in range(abs(months)):
        first = (first + 31 * DAY if months > 0 else first - DAY).replace(day=1)
    candidate = first + (wall.day - 1) * DAY
    while candidate.month != first.month:
        candidate -= DAY
    return candidate


def _exists(wall, tz):
    aware = wall.replace(tzinfo=ZoneInfo(tz))
    return aware.astimezone(UTC).astimezone(aware.tzinfo).replace(tzinfo=None, fold=0) == wall


def _offset(instant, tz):
    return instant.astimezone(ZoneInfo(tz)).utcoffset()


@cache
def _changes(tz):
    """Every instant at which the zone's own file changes its clock, oldest first."""
    data = _tzif(tz)
    # RFC 9636 §3: a block with 32-bit times comes first and is skipped for the one with 64 bits.
    _, times, types, chars, leaps, standards, universals = _header(data, 0)
    second = 44 + times * 5 + types * 6 + chars + leaps * 8 + standards + universals
    times = _header(data, second)[1]
    seconds = struct.unpack_from(f">{times}q", data, second + 44)
    earliest = datetime(2, 1, 1, tzinfo=UTC).timestamp()
    return [EPOCH + timedelta(seconds=one) for one in seconds if one > earliest]


def _header(data, offset):
    universals, standards, leaps, times, types, chars = struct.unpack_from(">6l", data, offset + 20)
    return data[offset : offset + 4], times, types, chars, leaps, standards, universals


def _tzif(tz):
    for folder in zoneinfo.TZPATH:
        if (file := Path(folder, tz)).is_file():
            return file.read_bytes()
    return resources.files("tzdata").joinpath("zoneinfo", *tz.split("/")).read_bytes()
