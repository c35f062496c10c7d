"""What people may do to a subscription, and what follows for its periods.

Callers first open all due periods: a decision is about periods that have not begun. There is no
proration. A change never touches a period that has begun: what was paid is kept, and the next
period has the new terms. All functions raise InvalidInput on `status` when the subscription's
status does not allow the change.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from billing_worker.domain.calendar import Interval, Unit
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import (
    BILLABLE,
    OVER,
    Subscription,
    SubscriptionStatus,
    move,
    reactivate,
)

_S = SubscriptionStatus


def changed(
    subscription: Subscription, *, money: Money, interval: Interval, now: datetime
) -> Subscription:
    """Set new terms from the next period on.

    A new interval starts a new series of periods, anchored at the start of the next period. It keeps
    the wanted day of the month where that anchor is on a shortened month's end (31 Mar after
    28 Feb). A new amount or currency keeps the series. An amount that was agreed for later is for the
    terms of before: new ones take its place.

    While nothing becomes due (paused, suspended), the next period is the first of the old series
    from `now` on. Earlier ones are skipped, and the pause counts from `now`.
    """
    _require(subscription, set(_S) - OVER)
    after = replace(subscription, money=money)
    if (money, interval) != (subscription.money, subscription.schedule.interval):
        after = at_its_price(after)
    if interval == subscription.schedule.interval:
        return after
    if subscription.status not in BILLABLE:
        after = replace(after.from_now_on(now), paused_at=subscription.paused_at and now)
    return after.in_new_series(after.start_of(after.next_period), interval)


def repriced(
    subscription: Subscription, money: Money, since: datetime, now: datetime
) -> Subscription:
    """Agree on the amount of periods that begin at `since` or later. It takes the place of one that
    was agreed for later before. Raises InvalidInput on `currency` or `amount_from`.
    """
    _require(subscription, set(_S) - OVER)
    if money.currency != subscription.money.currency:
        raise InvalidInput("currency", "cannot be changed for later: an amount can")
    if since <= now:
        reason = "must be in the future: without it the amount counts from the next period"
        raise InvalidInput("amount_from", reason)
    first = max(subscription.next_period, subscription.first_number_from(since))
    if subscription.is_past_end(first, subscription.start_of(first)):
        raise InvalidInput("amount_from", "no period begins at that time or later")
    if money == subscription.money:
        return at_its_price(subscription)
    return replace(subscription, new_amount_minor=money.minor, new_amount_from=since)


def at_its_price(subscription: Subscription) -> Subscription:
    """Keep the amount that it has: none is agreed for later any more."""
    return replace(subscription, new_amount_minor=None, new_amount_from=None)


def ending(subscription: Subscription, ends_at: datetime | None) -> Subscription:
    """Set the date from which no period becomes due; None: no such date.

    Raises InvalidInput on `ends_at` when no further period would be left.
    """
    _require(subscription, set(_S) - OVER)
    if ends_at is not None and ends_at <= subscription.start_of(subscription.next_period):
        raise InvalidInput("ends_at", "leaves no further period: end the subscription instead")
    return replace(subscription, ends_at=ends_at)


def before_period(subscription: Subscription, number: int) -> Subscription:
    """Return the subscription as it was before period `number` became due, but for its price.

    Only time has passed since then: no decision and no suspension. If the period was the last one,
    the ended subscription is active again.
    """
    ended = subscription.status is _S.ENDED
    return replace(
        subscription,
        status=_S.ACTIVE if ended else subscription.status,
        next_period=number,
        next_billing_at=subscription.start_of(number),
    )


def paused(subscription: Subscription, now: datetime) -> Subscription:
    """Pause: no period becomes due until `resumed`."""
    _require(subscription, BILLABLE)
    if subscription.cancels_at is not None:
        raise InvalidInput("status", "is about to be cancelled: withdraw the cancellation first")
    if subscription.next_billing_at is None:
        raise InvalidInput("status", "is a held import: nothing becomes due before it is activated")
    return replace(
        subscription,
        status=move(subscription.status, _S.PAUSED),
        next_billing_at=None,
        paused_at=now,
        paused_from=subscription.status,
    )


def pausing_until(
    subscription: Subscription, until: datetime, now: datetime, *, shift: bool
) -> Subscription:
    """Let a pause end by itself. `now` is when that is decided. Raises InvalidInput on `until`."""
    _require(subscription, {_S.PAUSED})
    if until <= now:
        raise InvalidInput("until", "must be in the future")
    return replace(subscription, resumes_at=until, resumes_shifted=shift)


def pause_is_over(subscription: Subscription, now: datetime) -> bool:
    """Whether the date until which it is paused has come. Another book ends what is handed over."""
    until = subscription.resumes_at
    return until is not None and until <= now and subscription.handed_over_at is None


@dataclass(frozen=True, slots=True)
class Resumed:
    subscription: Subscription
    skipped: range  # numbers of the periods that fell into the pause and are never billed


def resumed(subscription: Subscription, now: datetime, *, shift: bool, owes: bool) -> Resumed:
    """End a pause.

    `shift` True: the next period begins later by the length of the pause and is the new anchor, so
    the customer gets all the time that was paid for. False: the calendar stays. Periods that would
    have begun during the pause are skipped; service until the next boundary is free. Instalments
    (`ends_after_periods`) are not skipped: they are owed, and go on at the later dates. `owes`: the
    subscription is past due afterwards.
    """
    _require(subscription, {_S.PAUSED})
    paused_for = now - (subscription.paused_at or now)
    after = _unpaused(replace(subscription, status=_after_pause(subscription, owes=owes)))
    if shift and paused_for > timedelta(0):
        start = subscription.start_of(subscription.next_period) + paused_for
        after = after.in_new_series(start, subscription.schedule.interval)
    else:
        after = after.from_now_on(now)
    following = after.next_period
    if not after.is_past_end(following, after.start_of(following)):
        after = replace(after, next_period=following, next_billing_at=after.start_of(following))
        return Resumed(after, range(subscription.next_period, following))
    while following > subscription.next_period and after.is_past_end(
        following - 1, after.start_of(following - 1)
    ):
        following -= 1  # Only a period before the end can have been skipped.
    over = replace(ended(subscription), next_period=following)
    return Resumed(over, range(subscription.next_period, following))


MOST_DAYS_LATER = 366


def postponed(subscription: Subscription, days: int) -> Subscription:
    """Begin the next period `days` calendar days later; later ones are counted from there. What was
    paid lasts until then, and the days in between are free. Raises InvalidInput on `days`.
    """
    _require_dated(subscription)
    if not 1 <= days <= MOST_DAYS_LATER:
        raise InvalidInput("days", f"must be from 1 to {MOST_DAYS_LATER}")
    start = subscription.schedule.days_later(_next_start(subscription), days)
    return _at(subscription.in_new_series(start, subscription.schedule.interval))


def on_billing_day(subscription: Subscription, day: int) -> Subscription:
    """Begin the next period on the first `day` of a month at or after its date, never before it; later
    ones are counted from there. The days in between are free. Raises InvalidInput on `billing_day`.
    """
    _require_dated(subscription)
    interval = subscription.schedule.interval
    if interval.unit in {Unit.DAY, Unit.WEEK}:
        raise InvalidInput(
            "billing_day", f"is for months: its periods are counted by the {interval.unit}"
        )
    if subscription.schedule.wanted_day == day:
        return subscription
    start, cut = subscription.schedule.first_day_from(_next_start(subscription), day)
    return _at(subscription.in_series_of(start, interval, cut))


def freed(subscription: Subscription, periods: int) -> Subscription:
    """Give the next `periods` for nothing: they are never billed, and the dates stay. Raises
    InvalidInput on `free_periods`.
    """
    _require_dated(subscription)
    if subscription.is_in_instalments:
        raise InvalidInput(
            "free_periods", "are not for instalments, each of which is owed: postpone"
        )
    following = subscription.next_period + periods
    if periods < 1 or subscription.is_past_end(following, subscription.start_of(following)):
        raise InvalidInput("free_periods", "must be 1 or more, and leave a period to be charged")
    return _at(replace(subscription, next_period=following))


def _require_dated(subscription: Subscription) -> None:
    _require(subscription, BILLABLE)
    if subscription.next_billing_at is None:
        raise InvalidInput("status", "has no next date: it is held, or another book bills it")
    if subscription.cancels_at is not None:
        raise InvalidInput("status", "is about to be cancelled: withdraw the cancellation first")


def _next_start(subscription: Subscription) -> datetime:
    return subscription.start_of(subscription.next_period)


def _at(subscription: Subscription) -> Subscription:
    start = _next_start(subscription)
    if subscription.is_past_end(subscription.next_period, start):
        raise InvalidInput("ends_at", "leaves no further period: end the subscription instead")
    return replace(subscription, next_billing_at=start)


def cancelled(subscription: Subscription) -> Subscription:
    """Cancel now: no period becomes due, and no open invoice may be charged."""
    return _closed(subscription, _S.CANCELLED)


def called_off(subscription: Subscription) -> Subscription:
    """Cancel a subscription that has ended: its open invoices are no longer collected."""
    _require(subscription, {_S.ENDED})
    return replace(subscription, status=move(subscription.status, _S.CANCELLED))


def forgiven(subscription: Subscription, now: datetime) -> Subscription:
    """What a suspended one owes is void: it is billed again from the next period that begins."""
    _require(subscription, {_S.SUSPENDED})
    return reactivate(subscription, now)


def ended(subscription: Subscription) -> Subscription:
    """End now: no period becomes due, but open invoices are still owed and collected."""
    return _closed(subscription, _S.ENDED)


def cancelling(subscription: Subscription) -> Subscription:
    """Cancel when the next period would begin.

    A subscription without a next period (paused, suspended) is cancelled at once.
    """
    _require(subscription, set(_S) - OVER)
    if subscription.next_billing_at is None:
        return cancelled(subscription)
    return replace(subscription, cancels_at=subscription.next_billing_at)


def keeping(subscription: Subscription) -> Subscription:
    """Withdraw a cancellation that has not taken effect."""
    _require(subscription, set(_S) - OVER)
    return replace(subscription, cancels_at=None)


def _closed(subscription: Subscription, status: SubscriptionStatus) -> Subscription:
    _require(subscription, set(_S) - OVER)
    status = move(subscription.status, status)
    return _unpaused(replace(subscription, status=status, next_billing_at=None, cancels_at=None))


def _unpaused(subscription: Subscription) -> Subscription:
    return replace(
        subscription, paused_at=None, paused_from=None, resumes_at=None, resumes_shifted=False
    )


def _after_pause(subscription: Subscription, *, owes: bool) -> SubscriptionStatus:
    if owes:
        return move(subscription.status, _S.PAST_DUE)
    trialing = subscription.paused_from is _S.TRIALING
    return move(subscription.status, _S.TRIALING if trialing else _S.ACTIVE)


def _require(subscription: Subscription, allowed: Collection[SubscriptionStatus]) -> None:
    if subscription.status not in allowed:
        needed = " or ".join(sorted(allowed))
        raise InvalidInput("status", f"is {subscription.status}; must be {needed}")
