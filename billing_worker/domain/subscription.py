"""An agreement to pay an amount every period, and the periods that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from billing_worker.domain.calendar import Interval, Schedule
from billing_worker.domain.catch_up_policy import DEFAULT_POLICY, Policy
from billing_worker.domain.errors import IllegalTransition, InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.outgoing.notice import NoticePolicy


class SubscriptionStatus(StrEnum):
    TRIALING = "trialing"  # Before its first charge.
    ACTIVE = "active"
    PAST_DUE = "past_due"  # Owes for a period; further periods still become due.
    SUSPENDED = "suspended"  # Dunning ended without a payment; no period becomes due.
    PAUSED = "paused"
    CANCELLED = "cancelled"
    ENDED = "ended"  # No further period; open invoices are still collected.


_S = SubscriptionStatus
TRANSITIONS: Mapping[SubscriptionStatus, frozenset[SubscriptionStatus]] = {
    _S.TRIALING: frozenset({_S.ACTIVE, _S.PAST_DUE, _S.PAUSED, _S.CANCELLED, _S.ENDED}),
    # To suspended without being past due: there was no card, so no attempt was made.
    _S.ACTIVE: frozenset({_S.PAST_DUE, _S.SUSPENDED, _S.PAUSED, _S.CANCELLED, _S.ENDED}),
    _S.PAST_DUE: frozenset({_S.ACTIVE, _S.SUSPENDED, _S.PAUSED, _S.CANCELLED, _S.ENDED}),
    _S.SUSPENDED: frozenset({_S.ACTIVE, _S.CANCELLED, _S.ENDED}),
    _S.PAUSED: frozenset({_S.TRIALING, _S.ACTIVE, _S.PAST_DUE, _S.CANCELLED, _S.ENDED}),
    _S.CANCELLED: frozenset(),
    _S.ENDED: frozenset({_S.CANCELLED}),  # its open invoices are given up
}

BILLABLE = frozenset({_S.TRIALING, _S.ACTIVE, _S.PAST_DUE})
"""States in which a new period may become due."""

COLLECTABLE = frozenset({_S.TRIALING, _S.ACTIVE, _S.PAST_DUE, _S.ENDED})
"""States in which an open invoice may be charged. An ended subscription still owes what it used."""


PAYABLE = COLLECTABLE | {_S.SUSPENDED}
"""States in which an open invoice may be charged or paid on request."""

PAYABLE_DEBT = PAYABLE | {_S.CANCELLED}
"""States in which a customer may pay an uncollectible invoice. The ladder may end in CANCELLED."""

OVER = frozenset({_S.CANCELLED, _S.ENDED})
"""Final states: no period becomes due again."""


def refuse_again(status: SubscriptionStatus) -> None:
    """Raise InvalidInput on `reference_id` if the subscription of that reference is over.

    Nothing would ever be billed for it: a new agreement needs a new reference.
    """
    if status in OVER:
        reason = (
            f"is {status}: nothing is billed under it any more; a new agreement needs a new one"
        )
        raise InvalidInput("reference_id", reason)


def move(current: SubscriptionStatus, to: SubscriptionStatus) -> SubscriptionStatus:
    """Return `to`. Raises IllegalTransition when TRANSITIONS does not allow the change."""
    if to not in TRANSITIONS[current]:
        raise IllegalTransition(f"subscription: {current} -> {to}")
    return to


ONE_OFF = "one_off"
"""Kind of a subscription that represents one single charge: one period, ended from the start."""


@dataclass(frozen=True, slots=True)
class Subscription:
    id: int
    reference_id: str
    customer_id: int
    card_id: int | None
    status: SubscriptionStatus
    money: Money
    schedule: Schedule
    ends_after_periods: int | None
    next_period: int  # number of the first period without an invoice
    next_billing_at: datetime | None  # its start; None: no further period becomes due
    description: str | None = None
    series_start: int = 0  # number of the period that begins at the anchor
    paused_at: datetime | None = None
    paused_from: SubscriptionStatus | None = None  # what it was before the pause
    resumes_at: datetime | None = None  # the pause ends by itself; None: somebody resumes it
    resumes_shifted: bool = False  # and then as `resume --shift-anchor` does
    cancels_at: datetime | None = None  # no period that begins then or later becomes due
    catch_up: Policy = DEFAULT_POLICY
    dunning_policy: str | None = None  # None: the default ladder
    notices: NoticePolicy | None = None  # None: the default of the settings
    ends_at: datetime | None = None  # agreed end: no period that begins then or later is charged
    handed_over_at: datetime | None = None  # another book bills it; open invoices stay here
    new_amount_minor: int | None = None  # agreed for later, in the currency of `money`
    new_amount_from: datetime | None = None  # for periods that begin then or later

    def period(self, number: int) -> tuple[datetime, datetime]:
        """Return (start, end) of a period. Numbers continue across series: none is used twice."""
        return self.schedule.period(number - self.series_start)

    def start_of(self, number: int) -> datetime:
        return self.schedule.boundary(number - self.series_start)

    def price_at(self, start: datetime) -> Money:
        """Return what a period that begins at `start` costs."""
        new, since = self.new_amount_minor, self.new_amount_from
        if new is None or since is None or start < since:
            return self.money
        return Money.from_minor(new, self.money.currency)

    def priced_at(self, start: datetime) -> Subscription:
        """Return it with the price of a period that begins at `start` as its price from then on."""
        if self.new_amount_from is None or start < self.new_amount_from:
            return self
        return replace(
            self, money=self.price_at(start), new_amount_minor=None, new_amount_from=None
        )

    def first_number_from(self, instant: datetime) -> int:
        """Return the first number of this series whose period begins at or after `instant`."""
        return self.series_start + self.schedule.first_period_from(instant)

    @property
    def is_in_instalments(self) -> bool:
        """Whether a number of periods was agreed: each of them is owed."""
        return self.ends_after_periods is not None

    def in_new_series(self, start: datetime, interval: Interval) -> Subscription:
        """Return it with the next period at `start`, from which later ones are counted."""
        return self.in_series_of(start, interval, self.schedule.day_kept_at(start))

    def in_series_of(self, start: datetime, interval: Interval, day: int | None) -> Subscription:
        """Return the same with the wanted `day` of the month; None: that of `start`."""
        schedule = Schedule(start, interval.unit, interval.count, self.schedule.tz, day)
        return replace(self, schedule=schedule, series_start=self.next_period)

    def from_now_on(self, now: datetime) -> Subscription:
        """Return it with the next period at the first date of its calendar from `now` on.

        Dates before it are not billed. Their periods are skipped; instalments are owed, so they move
        on to the later dates instead.
        """
        number = self.first_number_from(now)
        if number <= self.next_period:
            return self
        if self.is_in_instalments:
            return self.in_new_series(self.start_of(number), self.schedule.interval)
        return replace(self, next_period=number)

    def is_past_end(self, number: int, start: datetime) -> bool:
        """Whether the subscription ends before period `number`, which would begin at `start`."""
        last, ends_at = self.ends_after_periods, self.ends_at
        return (last is not None and number >= last) or (ends_at is not None and start >= ends_at)


@dataclass(frozen=True, slots=True)
class DuePeriod:
    number: int
    start: datetime
    end: datetime


def open_next_period(subscription: Subscription, now: datetime) -> tuple[DuePeriod, Subscription]:
    """Take the next due period and return it with the subscription moved past it.

    One period per call: the catch-up policy decides about a backlog. The caller writes both in one
    transaction, so that a period is opened exactly once. Raises IllegalTransition when the period
    begins after `now`.
    """
    number = subscription.next_period
    start, end = subscription.period(number)
    if start > now:
        raise IllegalTransition(f"period {number} starts at {start.isoformat()}, after now")
    following = number + 1
    ended = subscription.is_past_end(following, end)
    status = subscription.status
    if ended:
        status = move(status, SubscriptionStatus.ENDED)
    elif status is SubscriptionStatus.TRIALING:
        status = move(status, SubscriptionStatus.ACTIVE)
    moved = replace(
        subscription.priced_at(start),
        status=status,
        next_period=following,
        next_billing_at=None if ended else end,
    )
    return DuePeriod(number, start, end), moved


def reactivate(subscription: Subscription, now: datetime) -> Subscription:
    """Reactivate a suspended subscription after a payment.

    Periods that began during the suspension are not billed. A scheduled cancellation whose date has
    passed takes effect now; a later one, when the next period would begin.
    """
    subscription = subscription.from_now_on(now)
    number = subscription.next_period
    start = subscription.start_of(number)
    leaves = subscription.cancels_at
    if leaves is not None and leaves <= now:
        over = move(subscription.status, SubscriptionStatus.CANCELLED)
        return replace(subscription, status=over, next_billing_at=None, cancels_at=None)
    ended = subscription.is_past_end(number, start)
    status = SubscriptionStatus.ENDED if ended else SubscriptionStatus.ACTIVE
    return replace(
        subscription,
        status=move(subscription.status, status),
        next_period=number,
        next_billing_at=None if ended or subscription.handed_over_at else start,
        cancels_at=None if ended else leaves,
    )


MOST_PERIODS_BACK = 1_000
MOST_YEARS_BACK = 5


def refuse_forgotten_start(schedule: Schedule, first: int, now: datetime) -> None:
    """Raise InvalidInput on `anchor_at` when too many past periods would be charged.

    An anchor in the year 0026 or 1926 is a typing error and would open thousands of periods.
    `first` is the number of the first period to be charged, counted from the anchor. For an older
    agreement the caller states with `paid_through` what has been charged.
    """
    start = schedule.boundary(first)
    if start >= now:
        return
    if now - start > timedelta(days=366 * MOST_YEARS_BACK):
        reason = f"the first period to be charged began more than {MOST_YEARS_BACK} years ago"
    elif schedule.period_at(now) - first >= MOST_PERIODS_BACK:
        reason = f"more than {MOST_PERIODS_BACK} periods would be due at once"
    else:
        return
    raise InvalidInput("anchor_at", f"{reason}: say with paid_through what has been charged")


LARGEST_MISS = timedelta(days=1)
"""A `paid_through` closer than this behind a boundary is taken for a slip: a last second that was
counted in, another time zone, a date without its time.
"""


def near_miss(schedule: Schedule, paid_through: datetime) -> tuple[datetime, datetime] | None:
    """Return the two dates that a `paid_through` shortly after a boundary may mean: that boundary,
    where the period that begins there is to be charged, and the next one, where it is paid. None: it
    misses none, by less than a day and less than a quarter of the period.

    Shortly *before* a boundary both readings are the same: the period there is the first to be charged.
    """
    if paid_through <= schedule.anchor:
        return None
    start, end = schedule.period(schedule.period_at(paid_through))
    missed_by = paid_through - start
    if not timedelta(0) < missed_by < min(LARGEST_MISS, (end - start) / 4):
        return None
    return start, end


def refuse_near_miss(schedule: Schedule, paid_through: datetime) -> None:
    """Refuse what would leave a period unbilled without a word. Raises InvalidInput on
    `paid_through`.
    """
    meant = near_miss(schedule, paid_through)
    if meant is not None:
        start, end = (one.isoformat() for one in meant)
        reason = (
            f"misses the boundary {start} by {paid_through - meant[0]}: say {start} if the period from "
            f"there is to be charged, or {end} if it is paid"
        )
        raise InvalidInput("paid_through", reason)
