"""Cases other billing systems publish, in documents and test suites: we must agree with each.

Only peers that keep the anchor are here. Some do not, on purpose, and are no example for us:
PayPal lets the 31st become the 1st (developer.paypal.com, subscription-billing-cycles), Trust
Payments turns the 29th and later into the 28th (help.trustpayments.com 4403183526417), Kartra lets
Jan 31 become Mar 2 and stay there (support.kartra.com 153000190409). Kill Bill reckons with the one
UTC offset of the account's first day (TestWithTimeZones); cases that hang on that are left out.

Where a source names no year, the year is ours. A date alone is a day on the customer's calendar;
a date with a time is that very instant.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

import pytest

from billing_worker.domain.calendar import Schedule, Unit

DAY, WEEK, MONTH, QUARTER, YEAR = Unit

STRIPE = "Stripe docs, billing/subscriptions/billing-cycle"
STRIPE_TRIALS = "Stripe docs, billing/subscriptions/trials"
RECURLY = "Recurly support 46684925586708"
CHARGEBEE = "Chargebee docs, next-billing-date"
CHARGEBEE_KB = "Chargebee docs, kb/billing/when-is-the-next-billing-date-for-my-customer"
PAYPAL = "PayPal docs, subscription-billing-cycles"
POLAR = "polarsource/polar test_service.py, test_anchor_monthly_cycle (polar#10664)"
POSTHOG = "PostHog/posthog#42016"
LAGO_DAYS = "getlago/lago-api billing_date_query_spec.rb"
LAGO_BILLING = "getlago/lago-api spec/scenarios/subscriptions/billing_spec.rb"
LAGO_USAGE = "getlago/lago-api anniversary_period_boundaries_spec.rb"
LAGO_1840 = "getlago/lago-api#1840"
KILLBILL_BCD = "killbill/killbill TestBillCycleDayCalculator"
KILLBILL_INTERVAL = "killbill/killbill TestInAdvanceBillingIntervalDetail"
KILLBILL_ZONES = "killbill/killbill TestWithTimeZones"
OPENMETER = "openmeterio/openmeter recurrence_test.go, TestGetPeriodAt"
OPENMETER_ADD = "openmeterio/openmeter datetime_test.go, TestDateTimeAdd"
FLOWGLAD = "flowglad/flowglad billingIntervalHelpers.unit.test.ts"


class Cycle(NamedTuple):
    """One boundary after the other, from the anchor on."""

    source: str
    unit: Unit
    count: int
    boundaries: list[str]
    tz: str = "UTC"


CYCLES = [
    Cycle(STRIPE, MONTH, 1, ["2026-09-02", "2026-10-02", "2026-11-02", "2026-12-02", "2027-01-02"]),
    Cycle(STRIPE, MONTH, 1, ["2026-01-31", "2026-02-28", "2026-03-31", "2026-04-30"]),
    Cycle(STRIPE, MONTH, 1, ["2028-01-31", "2028-02-29", "2028-03-31", "2028-04-30"]),
    Cycle(STRIPE, WEEK, 1, ["2022-06-03", "2022-06-10", "2022-06-17", "2022-06-24", "2022-07-01"]),
    Cycle(RECURLY, MONTH, 1, ["2026-01-29", "2026-02-28", "2026-03-29"]),
    Cycle(RECURLY, MONTH, 1, ["2026-01-30", "2026-02-28", "2026-03-30"]),
    Cycle(RECURLY, MONTH, 1, ["2026-01-31", "2026-02-28", "2026-03-31"]),
    Cycle(RECURLY, MONTH, 1, ["2028-01-29", "2028-02-29", "2028-03-29"]),
    Cycle(RECURLY, MONTH, 1, ["2028-01-30", "2028-02-29", "2028-03-30"]),
    Cycle(RECURLY, MONTH, 1, ["2028-01-31", "2028-02-29", "2028-03-31"]),
    Cycle(CHARGEBEE, MONTH, 1, ["2015-10-01", "2015-11-01"]),
    Cycle(CHARGEBEE, WEEK, 1, ["2015-10-01", "2015-10-08"]),
    Cycle(CHARGEBEE, YEAR, 1, ["2015-10-01", "2016-10-01"]),
    Cycle(CHARGEBEE_KB, MONTH, 1, ["2020-08-31", "2020-09-30"], "Asia/Kolkata"),
    Cycle(PAYPAL, WEEK, 1, ["2008-12-23", "2008-12-30", "2009-01-06"]),
    Cycle(POLAR, MONTH, 1, ["2024-01-31", "2024-02-29", "2024-03-31", "2024-04-30"]),
    Cycle(LAGO_1840, MONTH, 1, ["2024-01-30", "2024-02-29", "2024-03-30"]),
    Cycle(
        LAGO_BILLING + ", anniversary on a 31st",
        MONTH,
        1,
        [
            *["2022-12-31", "2023-01-31", "2023-02-28", "2023-03-31", "2023-04-30", "2023-05-31"],
            *["2023-06-30", "2023-07-31", "2023-08-31", "2023-09-30", "2023-10-31", "2023-11-30"],
            *["2023-12-31", "2024-01-31", "2024-02-29", "2024-03-31"],
        ],
    ),
    Cycle(
        KILLBILL_INTERVAL + ", testWithBCDLargerThanEndMonth (killbill#127)",
        MONTH,
        1,
        ["2017-01-31", "2017-02-28", "2017-03-31", "2017-04-30"],
    ),
    Cycle(
        # At 08:01 UTC it is past midnight in Juneau's summer and still the day before in its winter.
        KILLBILL_ZONES + ", testWithDayLightSaving (killbill#445)",
        MONTH,
        1,
        [
            *["2015-10-01T00:01:01-08:00", "2015-11-01", "2015-12-01", "2016-01-01", "2016-02-01"],
            *["2016-03-01", "2016-04-01", "2016-05-01", "2016-06-01", "2016-07-01", "2016-08-01"],
            *["2016-09-01", "2016-10-01", "2016-11-01", "2016-12-01", "2017-01-01", "2017-02-01"],
        ],
        "America/Juneau",
    ),
    Cycle(
        KILLBILL_ZONES + ", testReferenceTimeInDSTGap",
        DAY,
        1,
        ["2015-03-07T02:00:00-08:00", "2015-03-08T02:00:00-08:00"],
        "America/Los_Angeles",
    ),
    Cycle(
        POSTHOG,
        WEEK,
        1,
        ["2025-10-26T08:00:00-05:00", "2025-11-02T08:00:00-06:00", "2025-11-09T08:00:00-06:00"],
        "America/Chicago",
    ),
    Cycle(OPENMETER_ADD, MONTH, 1, ["2024-12-31", "2025-01-31"]),
    Cycle(OPENMETER_ADD, MONTH, 1, ["2025-01-31", "2025-02-28"]),
    Cycle(OPENMETER_ADD, MONTH, 1, ["2016-11-30", "2016-12-30"]),
    Cycle(OPENMETER_ADD, MONTH, 6, ["2024-12-31", "2025-06-30"]),
    Cycle(OPENMETER_ADD, YEAR, 1, ["2024-02-29", "2025-02-28"]),
    Cycle(OPENMETER_ADD, YEAR, 2, ["2024-02-29", "2026-02-28"]),
    Cycle(OPENMETER_ADD, WEEK, 1, ["2025-02-01T12:00:00Z", "2025-02-08T12:00:00Z"]),
    Cycle(FLOWGLAD, MONTH, 1, ["2024-01-31T10:00:00Z", "2024-02-29T10:00:00Z"]),
    Cycle(FLOWGLAD, MONTH, 1, ["2023-01-31T10:00:00Z", "2023-02-28T10:00:00Z"]),
    Cycle(FLOWGLAD, MONTH, 3, ["2024-01-31T10:00:00Z", "2024-04-30T10:00:00Z"]),
    Cycle(FLOWGLAD, MONTH, 5, ["2023-11-15T09:30:00Z", "2024-04-15T09:30:00Z"]),
    Cycle(FLOWGLAD, MONTH, 1, ["2024-01-31T23:59:59.999Z", "2024-02-29T23:59:59.999Z"]),
    Cycle(FLOWGLAD, YEAR, 1, ["2024-02-29T10:00:00Z", "2025-02-28T10:00:00Z"]),
    Cycle(FLOWGLAD, YEAR, 2, ["2024-02-29T10:00:00Z", "2026-02-28T10:00:00Z"]),
]


@pytest.mark.parametrize("case", CYCLES, ids=lambda case: f"{case.source}: {case.boundaries[0]}")
def test_boundaries_follow_one_another_as_published(case):
    schedule = _schedule(case.boundaries[0], case.unit, case.count, case.tz)
    found = [schedule.boundary(n) for n in range(len(case.boundaries))]
    assert [
        _like(published, instant, case.tz)
        for published, instant in zip(case.boundaries, found, strict=True)
    ] == case.boundaries


class Days(NamedTuple):
    """Days far from the anchor on which a period begins, and days on which none does."""

    source: str
    anchor: str
    unit: Unit
    count: int
    billed: list[str]
    not_billed: list[str]
    tz: str = "UTC"


DAYS = [
    Days(LAGO_DAYS, "2021-02-20", WEEK, 1, ["2022-06-25", "2022-07-02"], ["2022-06-26"]),
    Days(LAGO_DAYS, "2021-02-20", MONTH, 1, ["2022-06-20", "2022-08-20"], ["2022-07-21"]),
    Days(
        LAGO_DAYS,
        "2021-03-31",
        MONTH,
        1,
        ["2023-02-28", "2024-02-29", "2023-04-30", "2023-01-31"],
        ["2023-02-27"],
    ),
    Days(LAGO_DAYS, "2021-02-20", QUARTER, 1, ["2022-08-20", "2030-05-20"], ["2022-09-20"]),
    Days(LAGO_DAYS, "2021-01-15", QUARTER, 1, ["2022-07-15", "2022-10-15", "2024-04-15"], []),
    Days(LAGO_DAYS, "2021-03-15", QUARTER, 1, ["2022-06-15", "2022-12-15", "2023-03-15"], []),
    Days(
        LAGO_DAYS,
        "2021-05-31",
        QUARTER,
        1,
        ["2023-02-28", "2024-02-29", "2023-11-30", "2023-08-31"],
        [],
    ),
    Days(
        LAGO_DAYS,
        "2021-05-30",
        QUARTER,
        1,
        ["2023-02-28", "2024-02-29", "2023-11-30", "2023-08-30"],
        ["2023-08-31"],
    ),
    Days(LAGO_DAYS, "2021-02-20", MONTH, 6, ["2022-08-20", "2030-08-20"], ["2022-11-20"]),
    Days(LAGO_DAYS, "2021-08-31", MONTH, 6, ["2023-02-28", "2024-02-29", "2023-08-31"], []),
    Days(
        LAGO_DAYS,
        "2021-08-30",
        MONTH,
        6,
        ["2023-02-28", "2024-02-29", "2023-08-30"],
        ["2023-08-31"],
    ),
    Days(LAGO_DAYS, "2021-02-20", YEAR, 1, ["2023-02-20", "2030-02-20"], ["2023-03-20"]),
    Days(LAGO_DAYS, "2021-02-28", YEAR, 1, ["2023-02-28", "2024-02-28", "2030-02-28"], []),
    Days(LAGO_DAYS, "2020-02-29", YEAR, 1, ["2023-02-28", "2024-02-29", "2030-02-28"], []),
    Days(
        LAGO_BILLING + ", anniversary on a 30",
        "2022-04-30",
        MONTH,
        1,
        ["2023-01-30", "2023-02-28", "2023-03-30", "2023-12-30", "2024-02-29", "2024-03-30"],
        [],
    ),
    Days(
        LAGO_BILLING + ", anniversary on a 28 of february",
        "2022-02-28",
        MONTH,
        1,
        ["2023-01-28", "2023-02-28", "2023-03-28", "2023-07-28", "2023-12-28"],
        [],
    ),
    Days(
        LAGO_BILLING + ", UTC+ timezone",
        "2023-02-02T00:00:00Z",
        MONTH,
        1,
        ["2023-03-02"],
        ["2023-03-01", "2023-03-03"],
        "Asia/Kolkata",
    ),
    Days(
        LAGO_BILLING + ", UTC- timezone",
        "2023-02-02T05:00:00Z",
        MONTH,
        1,
        ["2023-03-02"],
        ["2023-03-01", "2023-03-03"],
        "America/Bogota",
    ),
    Days(
        LAGO_BILLING + ", weekly in a UTC- timezone",
        "2023-02-01T06:10:00Z",
        WEEK,
        1,
        ["2023-02-15"],
        ["2023-02-14", "2023-02-16"],
        "America/Bogota",
    ),
    Days(
        KILLBILL_INTERVAL + ", testBCD31StartingWith30DayMonth",
        "2012-01-31",
        MONTH,
        1,
        ["2012-04-30", "2012-05-31"],
        ["2012-05-30"],
    ),
    Days(
        KILLBILL_INTERVAL + ", testCalculateFirstBillingCycleDate2",
        "2011-12-30",
        MONTH,
        1,
        ["2012-02-29"],
        ["2012-02-28"],
    ),
]


@pytest.mark.parametrize("case", DAYS, ids=lambda case: f"{case.source}: {case.anchor}")
def test_a_period_begins_on_the_published_days_and_on_no_other(case):
    schedule = _schedule(case.anchor, case.unit, case.count, case.tz)
    assert [day for day in case.billed if not _begins_on(day, schedule)] == []
    assert [day for day in case.not_billed if _begins_on(day, schedule)] == []


class Period(NamedTuple):
    """The period that holds an instant; `end` belongs to the next one."""

    source: str
    anchor: str
    unit: Unit
    count: int
    instant: str
    start: str
    end: str


PERIODS = [
    Period(LAGO_USAGE, "2024-02-29", YEAR, 1, "2025-02-20", "2024-02-29", "2025-02-28"),
    Period(LAGO_USAGE, "2024-02-29", YEAR, 1, "2025-03-10", "2025-02-28", "2026-02-28"),
    Period(LAGO_USAGE, "2022-01-31", QUARTER, 1, "2022-04-15", "2022-01-31", "2022-04-30"),
    Period(LAGO_USAGE, "2022-01-31", QUARTER, 1, "2022-05-31", "2022-04-30", "2022-07-31"),
    Period(LAGO_USAGE, "2022-01-31", QUARTER, 1, "2022-07-30", "2022-04-30", "2022-07-31"),
    Period(LAGO_USAGE, "2022-01-31", QUARTER, 1, "2022-08-15", "2022-07-31", "2022-10-31"),
    Period(LAGO_USAGE, "2022-01-29", QUARTER, 1, "2022-02-28", "2022-01-29", "2022-04-29"),
    Period(LAGO_USAGE, "2021-04-30", QUARTER, 1, "2021-05-31", "2021-04-30", "2021-07-30"),
    Period(LAGO_USAGE, "2021-04-30", QUARTER, 1, "2021-07-30", "2021-07-30", "2021-10-30"),
    Period(LAGO_USAGE, "2021-01-31", MONTH, 6, "2021-04-30", "2021-01-31", "2021-07-31"),
    Period(LAGO_USAGE, "2021-04-30", MONTH, 6, "2021-06-30", "2021-04-30", "2021-10-30"),
    Period(LAGO_USAGE, "2021-04-30", MONTH, 6, "2021-11-15", "2021-10-30", "2022-04-30"),
    Period(
        OPENMETER,
        "2025-01-31T15:00:00Z",
        MONTH,
        1,
        "2025-08-13T20:00:00Z",
        "2025-07-31T15:00:00Z",
        "2025-08-31T15:00:00Z",
    ),
    Period(
        OPENMETER + ", exclusive at the end",
        "2025-01-31T15:00:00Z",
        MONTH,
        1,
        "2025-09-30T15:00:00Z",
        "2025-09-30T15:00:00Z",
        "2025-10-31T15:00:00Z",
    ),
    Period(
        OPENMETER,
        "2025-01-30T15:00:00Z",
        MONTH,
        1,
        "2025-02-13T20:00:00Z",
        "2025-01-30T15:00:00Z",
        "2025-02-28T15:00:00Z",
    ),
]


@pytest.mark.parametrize("case", PERIODS, ids=lambda case: f"{case.source}: {case.instant}")
def test_an_instant_belongs_to_the_published_period(case):
    schedule = _schedule(case.anchor, case.unit, case.count, "UTC")
    period = schedule.period(schedule.period_at(_instant(case.instant, "UTC")))
    assert period == (_instant(case.start, "UTC"), _instant(case.end, "UTC"))


class Next(NamedTuple):
    """The first boundary on or after an instant."""

    source: str
    anchor: str
    unit: Unit
    count: int
    instant: str
    boundary: str


NEXT = [
    Next(KILLBILL_BCD, "2022-01-23", MONTH, 1, "2022-07-19", "2022-07-23"),
    Next(KILLBILL_BCD, "2022-01-17", MONTH, 1, "2022-07-19", "2022-08-17"),
    Next(KILLBILL_BCD, "2022-01-31", MONTH, 1, "2022-02-19", "2022-02-28"),
    Next(KILLBILL_BCD, "2022-02-02", WEEK, 1, "2022-02-19", "2022-02-23"),
    Next(KILLBILL_BCD, "2022-02-18", WEEK, 1, "2022-02-25", "2022-02-25"),
    Next(KILLBILL_BCD, "2022-02-02", WEEK, 2, "2022-02-25", "2022-03-02"),
    Next(KILLBILL_INTERVAL, "2012-01-03", MONTH, 1, "2012-03-02", "2012-03-03"),
    Next(KILLBILL_INTERVAL, "2012-01-03", MONTH, 1, "2012-03-03", "2012-03-03"),
    Next(KILLBILL_INTERVAL, "2012-01-03", MONTH, 1, "2012-03-04", "2012-04-03"),
    Next(KILLBILL_INTERVAL, "2012-01-15", MONTH, 1, "2012-07-16", "2012-08-15"),
]


@pytest.mark.parametrize("case", NEXT, ids=lambda case: f"{case.source}: {case.instant}")
def test_the_next_charge_after_an_instant_is_the_published_one(case):
    schedule = _schedule(case.anchor, case.unit, case.count, "UTC")
    n = schedule.first_period_from(_instant(case.instant, "UTC"))
    assert schedule.boundary(n) == _instant(case.boundary, "UTC")


class Trial(NamedTuple):
    """A trial of calendar days, whose end is the anchor of the monthly cycle after it."""

    source: str
    signup: str
    days: int
    charges: list[str]
    tz: str = "UTC"


TRIALS = [
    Trial(CHARGEBEE, "2015-10-01", 15, ["2015-10-16", "2015-11-16"]),
    Trial(
        CHARGEBEE_KB,
        "2020-09-01",
        10,
        ["2020-09-11T00:00:00+05:30", "2020-10-11T00:00:00+05:30"],
        "Asia/Kolkata",
    ),
    Trial(STRIPE_TRIALS, "2022-04-15", 7, ["2022-04-22", "2022-05-22"]),
    Trial(
        KILLBILL_ZONES + ", testIntoDaylightSavingTransition (killbill#743)",
        "2017-03-01T23:30:00-08:00",
        30,
        ["2017-03-31", "2017-04-30"],
        "America/Los_Angeles",
    ),
    Trial(
        KILLBILL_ZONES + ", testOutOfDaylightSavingTransition1",
        "2017-11-01T00:30:00-07:00",
        30,
        ["2017-12-01", "2018-01-01"],
        "America/Los_Angeles",
    ),
    Trial(
        KILLBILL_ZONES + ", testWithDayLightSaving",
        "2015-09-01T08:01:01Z",
        30,
        ["2015-10-01", "2015-11-01", "2015-12-01"],
        "America/Juneau",
    ),
]


@pytest.mark.parametrize("case", TRIALS, ids=lambda case: f"{case.source}: {case.signup}")
def test_charges_after_a_trial_fall_on_the_published_days(case):
    trial = _schedule(case.signup, DAY, case.days, case.tz)
    paid = Schedule(trial.boundary(1), MONTH, 1, case.tz)
    found = [
        _like(published, paid.boundary(n), case.tz) for n, published in enumerate(case.charges)
    ]
    assert found == case.charges


def _schedule(anchor, unit, count, tz):
    return Schedule(_instant(anchor, tz), unit, count, tz)


def _instant(text, tz):
    """A date alone is local midnight, where a peer's calendar days begin."""
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=ZoneInfo(tz)) if moment.tzinfo is None else moment


def _like(published, instant, tz):
    """`published` itself if it means `instant`, or else what should have been published."""
    if "T" in published:
        return published if datetime.fromisoformat(published) == instant else instant.isoformat()
    return instant.astimezone(ZoneInfo(tz)).date().isoformat()


def _begins_on(day, schedule):
    zone = ZoneInfo(schedule.tz)
    next_midnight = datetime.combine(date.fromisoformat(day) + timedelta(days=1), time(), zone)
    last_moment = next_midnight.astimezone(UTC) - timedelta(microseconds=1)
    start = schedule.boundary(schedule.period_at(last_moment))
    return start.astimezone(zone).date().isoformat() == day
