"""Notices to the customer before a charge: which charge needs one, how early, and whether it waits.

The rules behind the defaults are named in `docs/notices.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cache
from typing import Final

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money

USUAL_DAYS: Final = 7
LONG_INTERVAL_DAYS: Final = 30
"""Ahead of a renewal whose interval is half a year or longer."""

TRIAL_DAYS: Final = 7
FEWEST_TRIAL_DAYS: Final = 3
MOST_NOTICE_DAYS: Final = 90

HALF_A_YEAR: Final = {"day": 180, "week": 26, "month": 6, "quarter": 2, "year": 1}
"""Smallest count of each unit that is half a year or longer."""

NOT_ACCEPTED: Final = "notice_not_accepted"
"""Reason of an open invoice: nobody has confirmed that the customer was told of the charge."""

ACCEPTED_LATE: Final = "notice_accepted_late"
"""Reason of an open invoice: the customer was told fewer days ahead than the policy asks for."""

RULE: Final = "notice.required"

SLOW_RECEIVER: Final = timedelta(days=1)
"""A notice that took longer to be accepted is worth an alert, if a charge waits for it."""


class Mode(StrEnum):
    TELL = "tell"  # The notice is sent. The charge does not wait for it.
    REQUIRE = "require"  # The charge waits until a notice was accepted so many days before.


class NoticeType(StrEnum):
    RENEWAL_UPCOMING = "renewal.upcoming"
    TRIAL_ENDING = "trial.ending"


@dataclass(frozen=True, slots=True)
class NoticePolicy:
    """`days`: ahead of a renewal; None: USUAL_DAYS, or LONG_INTERVAL_DAYS for a long interval.
    `trial_days`: ahead of the first charge after a trial; None: TRIAL_DAYS.

    Raises InvalidInput on `notices` for other numbers.
    """

    mode: Mode = Mode.TELL
    days: int | None = None
    trial_days: int | None = None

    def __post_init__(self) -> None:
        for days, fewest in ((self.days, 1), (self.trial_days, FEWEST_TRIAL_DAYS)):
            if days is not None and not fewest <= days <= MOST_NOTICE_DAYS:
                raise InvalidInput("notices", f"days must be from {fewest} to {MOST_NOTICE_DAYS}")

    @classmethod
    def parse(cls, text: str) -> NoticePolicy:
        """Read "tell", "require", "require:30" (days before a renewal) or "require:30:5" (and before
        the end of a trial).
        """
        name, *days = text.split(":")
        if name not in set(Mode):
            raise InvalidInput("notices", f"must be one of {', '.join(Mode)}, as in require:30")
        if len(days) > 2 or not all(d.isascii() and d.isdigit() and len(d) < 4 for d in days):  # noqa: PLR2004
            raise InvalidInput(
                "notices", "must be like require:30, or require:30:7 with trial days"
            )
        return cls(Mode(name), *map(int, days))

    def __str__(self) -> str:
        days = [self.days, self.trial_days]
        if self.trial_days is not None and self.days is None:
            days = [USUAL_DAYS, self.trial_days]
        return ":".join([str(self.mode), *(str(d) for d in days if d is not None)])


USUAL_POLICY: Final = NoticePolicy()

_read = cache(NoticePolicy.parse)
"""There are few policies, and a claim reads one for each of its invoices."""


def chosen(text: str | None) -> NoticePolicy | None:
    """Return a subscription's own policy. Empty text: None, the default of the settings. Raises
    InvalidInput on `notices`.
    """
    return _read(text) if text else None


@dataclass(frozen=True, slots=True)
class Agreement:
    """What of a subscription decides about its notices."""

    policy: NoticePolicy | None  # its own; None: the default
    is_one_off: bool
    had_trial: bool
    is_long: bool  # its interval is half a year or longer


@dataclass(frozen=True, slots=True)
class Needed:
    """The notice that a charge needs."""

    type: NoticeType
    ahead: timedelta
    is_required: bool


def is_long(unit: str, count: int) -> bool:
    return count >= HALF_A_YEAR[unit]


def needed(agreement: Agreement, number: int, default: NoticePolicy) -> Needed | None:
    """Return which notice the charge for period `number` needs, or None.

    A one-off charge needs none: it was ordered. The first charge of an agreement without a trial
    needs none either: the customer has just agreed to it.
    """
    if agreement.is_one_off or (number == 0 and not agreement.had_trial):
        return None
    policy = default if agreement.policy is None else agreement.policy
    required = policy.mode is Mode.REQUIRE
    if number == 0:
        days = TRIAL_DAYS if policy.trial_days is None else policy.trial_days
        return Needed(NoticeType.TRIAL_ENDING, timedelta(days=days), required)
    days = LONG_INTERVAL_DAYS if agreement.is_long else USUAL_DAYS
    days = days if policy.days is None else policy.days
    return Needed(NoticeType.RENEWAL_UPCOMING, timedelta(days=days), required)


@dataclass(frozen=True, slots=True)
class Notice:
    """What was last told of the charge for one period."""

    subscription_id: int
    period_number: int
    period_start: datetime
    money: Money
    edition: int  # 1, 2 …: another amount or date is another edition; 0: not told yet
    told_at: datetime | None
    accepted_at: datetime | None = None
    accepted_by: str | None = None

    def is_of(self, start: datetime, money: Money) -> bool:
        """Whether it names this date and this amount."""
        return (self.period_start, self.money) == (start, money)


def earliest(needed: Needed, notice: Notice | None, now: datetime) -> datetime:
    """Return before when a charge that requires the notice is not made.

    `notice`: the one that names its date and amount, or None. A notice that nobody has accepted may
    be accepted now at the earliest.
    """
    accepted = notice.accepted_at if notice is not None else None
    return (accepted or now) + needed.ahead


def why_it_waits(notice: Notice | None) -> str:
    accepted = notice is not None and notice.accepted_at is not None
    return ACCEPTED_LATE if accepted else NOT_ACCEPTED


def was_slow(notice: Notice | None) -> bool:
    """Whether a person should look at the receiver: nobody has accepted the notice, or late."""
    if notice is None or notice.accepted_at is None:
        return True
    return notice.told_at is not None and notice.accepted_at - notice.told_at > SLOW_RECEIVER
