"""When periods begin and end.

    anchor ──▶ boundary 0 ──▶ boundary 1 ──▶ boundary 2 …      period n = [boundary n, boundary n+1)

Boundary n is the anchor plus n intervals on the *local wall clock* of the subscription's zone:

- The count starts at the anchor, never at the previous boundary. A day that the month does not
  have becomes its last day: Jan 31 → Feb 28 → Mar 31. Counting from Feb 28 would keep the 28th
  for good (https://github.com/polarsource/polar/issues/10664).
- Days and weeks are calendar days, not 24 h; the hour on the customer's clock stays
  (https://github.com/PostHog/posthog/issues/42016).
- A local time that does not exist moves forward by the gap: 02:30 becomes 03:30.
- A local time that occurs twice means the first. Boundary 0 is always the anchor itself, even in
  the second of two such hours.
- A calendar day that a zone skipped still counts. Samoa went from 2011-12-29 to 2011-12-31. Moving
  the 30th forward by 24 h would put it on the instant of the 31st: two charges at once and an empty
  period. With an interval of one day (no other interval can collide) that boundary is therefore
  12 h earlier, half-way between its neighbours. The next boundary keeps its time and its number.

So boundaries strictly increase in every zone of the tz database, and every instant belongs to
exactly one period. This module reads no clock.
"""

from __future__ import annotations

from calendar import isleap
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from functools import cache, partial
from importlib import resources
from zoneinfo import ZoneInfo

from billing_worker.domain.errors import InvalidInput

MAX_COUNT = 1000
"""A larger `interval_count` is taken for a typing error."""

_DAY = timedelta(days=1)
_OUTSIDE = "is outside the years 1 to 9999"  # The range of `datetime`.


class Unit(StrEnum):
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    QUARTER = "quarter"
    YEAR = "year"


_DAYS = {Unit.DAY: 1, Unit.WEEK: 7}
_MONTHS = {Unit.MONTH: 1, Unit.QUARTER: 3, Unit.YEAR: 12}
_LAST_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@dataclass(frozen=True, slots=True)
class Interval:
    """`count` units of calendar time: (MONTH, 3) is a quarter.

    It knows the calendar but no time zone: its datetimes are naive wall-clock times.
    Raises InvalidInput on `interval` (no such unit) or `interval_count` (not 1 to MAX_COUNT).
    """

    unit: Unit
    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", _unit(self.unit))
        if type(self.count) is not int or not 1 <= self.count <= MAX_COUNT:
            raise InvalidInput("interval_count", f"must be a whole number from 1 to {MAX_COUNT}")

    @property
    def is_one_day(self) -> bool:
        return self.unit is Unit.DAY and self.count == 1

    def after(self, wall: datetime, n: int, day: int | None = None) -> datetime:
        """`wall` plus n intervals (n may be negative), cut to the end of the month.

        `day` is the wanted day of the month where `wall` is on a cut one; None: that of `wall`.

        Raises OverflowError or ValueError outside the years 1 to 9999.
        """
        if self.unit in _DAYS:
            return wall + n * self._days
        month_number = wall.year * 12 + wall.month - 1 + n * self._months
        year, month = divmod(month_number, 12)
        # `monthrange` also finds the weekday, which takes longer than all the rest here.
        last_day = 29 if month == 1 and isleap(year) else _LAST_DAYS[month]
        return wall + (date(year, month + 1, min(day or wall.day, last_day)) - wall.date())

    def whole_between(self, start: datetime, wall: datetime, day: int | None = None) -> int:
        """The largest n for which `after(start, n, day) <= wall`; negative before `start`."""
        if self.unit in _DAYS:
            return (wall - start) // self._days
        months = (wall.year - start.year) * 12 + wall.month - start.month
        n = months // self._months
        return n if self.after(start, n, day) <= wall else n - 1

    @property
    def _days(self) -> timedelta:
        return _DAYS[self.unit] * self.count * _DAY

    @property
    def _months(self) -> int:
        return _MONTHS[self.unit] * self.count


@dataclass(frozen=True, slots=True)
class Schedule:
    """All periods of one subscription, past and future, numbered from the anchor.

    `anchor` is aware and kept in UTC, `tz` an IANA name. Every datetime that comes out is in UTC.
    Raises InvalidInput on `anchor_at`, `interval`, `interval_count` or `timezone` when made, and
    on `period` when asked for a boundary outside the years 1 to 9999.
    """

    anchor: datetime
    unit: Unit
    count: int
    tz: str
    day: int | None = None
    """The wanted day of the month, where the anchor is on a month's end that was cut: a series that
    begins on Feb 28 goes on to Mar 31. None: the anchor's own day. Days and weeks only keep it.
    """

    interval: Interval = field(init=False, repr=False, compare=False)
    _zone: ZoneInfo = field(init=False, repr=False, compare=False)
    _local_anchor: datetime = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        keep = partial(object.__setattr__, self)  # A frozen dataclass allows no other assignment.
        keep("anchor", _utc("anchor_at", self.anchor))
        keep("interval", Interval(self.unit, self.count))
        keep("unit", self.interval.unit)
        keep("_zone", _zone_named(self.tz))
        keep("_local_anchor", _wall("anchor_at", self.anchor, self._zone))
        if self.day is not None and not _is_cut(self._local_anchor, self.day):
            raise InvalidInput(
                "billing_day", "must be later than an anchor on its month's last day"
            )

    @property
    def wanted_day(self) -> int:
        """The day of the month that periods of months begin on, where a month has it."""
        return self.day or self._local_anchor.day

    def first_day_from(self, instant: datetime, day: int) -> tuple[datetime, int | None]:
        """Return the first `day` of a month at or after the local day of `instant`, at its time of
        day, in UTC; and that day where the month has no such day and it is cut. Raises InvalidInput
        on `billing_day`.
        """
        if not 1 <= day <= max(_LAST_DAYS):
            raise InvalidInput("billing_day", "must be from 1 to 31")
        wall = _wall("instant", _utc("instant", instant), self._zone)
        month = Interval(Unit.MONTH, 1)
        this = month.after(wall.replace(day=1), 0, day)
        local = this if this >= wall else month.after(wall.replace(day=1), 1, day)
        start = datetime.combine(local, local.time(), self._zone).astimezone(UTC)
        return start, day if _is_cut(local, day) else None

    def days_later(self, instant: datetime, days: int) -> datetime:
        """Return `instant` plus calendar days, at the same local time of day, in UTC."""
        wall = _wall("instant", _utc("instant", instant), self._zone) + timedelta(days=days)
        return datetime.combine(wall, wall.time(), self._zone).astimezone(UTC)

    def day_kept_at(self, start: datetime) -> int | None:
        """Return the wanted day of the month for a new series that begins at `start`, if `start` is
        on a month's end for which that day was cut.
        """
        wanted = self.day or (None if self.unit in _DAYS else self._local_anchor.day)
        local = _wall("anchor_at", _utc("anchor_at", start), self._zone)
        return wanted if wanted is not None and _is_cut(local, wanted) else None

    def boundary(self, n: int) -> datetime:
        """The instant at which period n begins and period n-1 ends."""
        if n == 0:
            return self.anchor
        try:
            return self._boundary(n)
        except (OverflowError, ValueError) as error:
            raise InvalidInput("period", f"{n} {_OUTSIDE}") from error

    def period(self, n: int) -> tuple[datetime, datetime]:
        """Return (start, end) of period n; `end` already belongs to period n+1."""
        return self.boundary(n), self.boundary(n + 1)

    def period_at(self, instant: datetime) -> int:
        """Return the n for which `boundary(n) <= instant < boundary(n + 1)`, without a search.

        The local time gives n directly, wrong by one at most: no zone ever moved its clocks by more
        than a day, and no interval is shorter than a day.
        """
        moment = _utc("instant", instant)
        n = self._guess_period_at(moment)
        if moment < self.boundary(n):
            return n - 1
        if moment >= self.boundary(n + 1):
            return n + 1
        return n

    def first_period_from(self, instant: datetime) -> int:
        """Return the first n >= 0 whose period begins at or after `instant`.

        A customer who has paid through `instant` is next charged for that period.
        """
        moment = _utc("instant", instant)
        if moment <= self.anchor:
            return 0
        n = self.period_at(moment)
        return n if self.boundary(n) == moment else n + 1

    def _boundary(self, n: int) -> datetime:
        wall = self.interval.after(self._local_anchor, n, self.day)
        # `combine` gives fold=0, for which PEP 495 uses the offset before a clock change. That
        # picks the first of two equal times, and moves a time inside a gap forward by the gap.
        instant = datetime.combine(wall, wall.time(), self._zone).astimezone(UTC)
        if self.interval.is_one_day and _wall("period", instant, self._zone) - wall >= _DAY:
            return instant - _DAY / 2
        return instant

    def _guess_period_at(self, moment: datetime) -> int:
        wall = _wall("instant", moment, self._zone)
        try:
            return self.interval.whole_between(self._local_anchor, wall, self.day)
        except (OverflowError, ValueError) as error:
            raise InvalidInput("instant", _OUTSIDE) from error


def _is_cut(wall: datetime, wanted: int) -> bool:
    """Whether `wall` is on the last day of a month that has no such day."""
    last_day = 29 if wall.month == 2 and isleap(wall.year) else _LAST_DAYS[wall.month - 1]  # noqa: PLR2004 - February
    return wall.day == last_day < wanted <= max(_LAST_DAYS)


def boundary(anchor: datetime, unit: Unit, count: int, n: int, tz: str) -> datetime:
    """`Schedule.boundary` for a single look-up: aware, in UTC; n may be negative."""
    return Schedule(anchor, unit, count, tz).boundary(n)


def period_at(anchor: datetime, unit: Unit, count: int, tz: str, instant: datetime) -> int:
    """`Schedule.period_at` for a single look-up."""
    return Schedule(anchor, unit, count, tz).period_at(instant)


def local_hour_after(instant: datetime, days: int, hour: int | None, tz: str) -> datetime:
    """Return `instant` plus `days` calendar days, at the nearest `hour` o'clock of `tz`; in UTC.

    It takes the nearest hour, not the next: after an attempt at 9:00:03, "3 days, at 9" means 3
    days and not 4 (getlago/lago-api dunning_campaign_v1_spec.rb:90-135). With `days` >= 1 the
    result is at least 12 hours later on the local clock. `hour` None keeps the time of day.
    """
    zone = _zone_named(tz)
    wall = _wall("instant", instant, zone) + timedelta(days=days)
    if hour is not None:
        # The day whose `hour` is at most 12 hours away.
        nearest = (wall + timedelta(hours=12 - hour)).date()
        wall = datetime.combine(nearest, time(hour))
    return datetime.combine(wall, wall.time(), zone).astimezone(UTC)


def _unit(name: str) -> Unit:
    try:
        return Unit(name)
    except ValueError as error:
        raise InvalidInput("interval", f"must be one of {', '.join(Unit)}") from error


# Zone rules come from the tzdata package, not from the operating system: two workers with different
# system updates must not compute different dates for one subscription.
_TZDATA = resources.files("tzdata")


@cache
def _zone_names() -> frozenset[str]:
    return frozenset((_TZDATA / "zones").read_text(encoding="ascii").split())


# This cache has no limit: ZoneInfo's own cache holds 8 zones, and a sweep needs more.
@cache
def _load_zone(name: str) -> ZoneInfo:
    with _TZDATA.joinpath("zoneinfo", *name.split("/")).open("rb") as rules:
        return ZoneInfo.from_file(rules, key=name)


def _zone_named(name: object) -> ZoneInfo:
    if not isinstance(name, str) or name not in _zone_names():
        raise InvalidInput("timezone", "must be an IANA name such as Europe/Berlin")
    return _load_zone(name)


def _utc(field: str, moment: object) -> datetime:
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise InvalidInput(field, "must be a time with its offset from UTC")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInput(field, _OUTSIDE) from error


def _wall(field: str, instant: datetime, zone: ZoneInfo) -> datetime:
    try:
        local = instant.astimezone(zone)
    except OverflowError as error:
        raise InvalidInput(field, _OUTSIDE) from error
    return datetime.combine(local, local.time())  # Four times as fast as replace(tzinfo=None).
