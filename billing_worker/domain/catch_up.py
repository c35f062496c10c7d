"""Decides what happens to due periods, above all to late ones.

    due periods ──decide──▶ collect │ waive │ hold ──place──▶ the date of each debit

A period on time is charged at once, at its agreed date. Whatever is late (an outage, an import, a
clock) goes by the subscription's policy, and no subscription is debited twice in one go: its late
debits keep a distance to every other debit of that *subscription*, made, dated, or coming up on an
agreed date (https://github.com/getlago/lago-api/pull/5935 took back a catch-up that had no such
rule). Other subscriptions of the same customer do not count: what is charged together on time, the
80 of a reseller for example, is charged together after an outage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from billing_worker.domain import lifecycle
from billing_worker.domain.attempt import Attempt, Origin
from billing_worker.domain.catch_up_policy import CatchUp, Policy
from billing_worker.domain.invoice import WAIVED, Invoice
from billing_worker.domain.subscription import BILLABLE, DuePeriod, Subscription, open_next_period

LATE_AFTER = timedelta(hours=1)
"""Age from which a period is late. A deploy or a failover takes minutes and makes nothing late."""

AGE_CAP = timedelta(days=62)
"""Two months of 31 days. A period older than this on its debit day is held, unless a named person
sets another limit: customers dispute such debits and win
(https://github.com/eileenmcnaughton/nz.co.fuzion.omnipaymultiprocessor/issues/199).
"""

SHORTEST_GAP = timedelta(days=1)
"""Distance between late debits of one subscription when the policy names none."""

CATCH_UP_RULE = "catch_up."
"""Prefix of every rule here, and so of the reason of an open invoice that waits for a person."""

MAX_PLANNED_PERIODS = 1_000
"""Most periods of one subscription in one plan; the next sweep continues."""

ON_TIME = "on_time"

_TRIES = 200


class Action(StrEnum):
    COLLECT = "collect"
    WAIVE = "waive"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Planned:
    """The decision about one due period."""

    period: DuePeriod
    action: Action
    rule: str  # which rule decided: ON_TIME, "catch_up.collect_all" …
    reason: str | None  # for a person; None when it is simply charged now
    at: datetime | None = None  # when it is debited; None unless collected


@dataclass(frozen=True, slots=True)
class Diary:
    """All debits of one subscription to which a late debit keeps its distance."""

    debits: tuple[datetime, ...] = ()  # made recently, or already dated

    def with_debit(self, at: datetime) -> Diary:
        return replace(self, debits=(*self.debits, at))


@dataclass(frozen=True, slots=True)
class Plan:
    before: Subscription
    planned: tuple[Planned, ...]  # oldest first
    after: Subscription  # moved past them; still due if there were more than MAX_PLANNED_PERIODS
    diary: Diary  # with the new debits


def is_late(subscription: Subscription, now: datetime) -> bool:
    """Whether the next period is late: then the policy and the subscription's diary decide about it."""
    start = subscription.next_billing_at
    return start is not None and now - start > LATE_AFTER


def plan(
    subscription: Subscription,
    now: datetime,
    diary: Diary,
    policy: Policy | None = None,
    age_cap: timedelta = AGE_CAP,
) -> Plan:
    """Decide about the due periods, at most MAX_PLANNED_PERIODS. `policy` overrides the subscription's."""
    policy = policy or subscription.catch_up
    periods, after = _due_periods(subscription, now)
    complete = after.next_billing_at is None or after.next_billing_at > now
    latest = periods[-1] if periods and complete else None
    planned, diary = _decided(subscription, periods, latest, policy, now, diary, age_cap)
    return Plan(subscription, planned, after, diary)


def plans(
    subscription: Subscription,
    now: datetime,
    diary: Diary,
    policy: Policy | None = None,
    age_cap: timedelta = AGE_CAP,
) -> Iterator[Plan]:
    """Yield plans until nothing is due, as one sweep after the other would make them."""
    while True:
        done = plan(subscription, now, diary, policy, age_cap)
        yield done
        subscription, diary = done.after, done.diary
        if not is_due(subscription, now):
            return


def plan_held(
    held: Sequence[DuePeriod],
    newest: int,
    subscription: Subscription,
    now: datetime,
    diary: Diary,
    policy: Policy,
    age_cap: timedelta = AGE_CAP,
) -> tuple[tuple[Planned, ...], Diary]:
    """Decide again about held periods (oldest first), by a policy that a person has named.

    `newest` is the number of the latest opened period that is not void: the numbers after it may
    have been skipped or given free, and then no later period is collected.
    """
    latest = held[-1] if held[-1].number == newest and not is_due(subscription, now) else None
    return _decided(subscription, held, latest, policy, now, diary, age_cap)


def was_missed(invoice: Invoice, attempts: Sequence[Attempt], now: datetime) -> bool:
    """Whether the invoice's first charge is late and was never sent.

    The cause does not matter (dead workers, an unreachable gateway, the kill switch, a pause): the
    catch-up rules decide about it. Dunning steps are never "missed"; they have their own dates.
    """
    at = invoice.next_attempt_at
    return (
        at is not None
        and now - at > LATE_AFTER
        and invoice.next_origin is Origin.SCHEDULED
        and all(attempt.submitted_at is None for attempt in attempts)
    )


def plan_missed(
    missed: Sequence[DuePeriod],
    newest: int,
    subscription: Subscription,
    now: datetime,
    diary: Diary,
    *,
    waited_for_older: bool = False,
) -> tuple[tuple[Planned, ...], Diary]:
    """Decide again about opened periods (oldest first) whose first charge `was_missed`.

    `newest` is the number of the latest opened period that is not void. `waited_for_older`: the periods are late
    because an older invoice was in recovery, not because of an outage. None of them is waived; they
    only keep their distance.
    """
    policy = subscription.catch_up
    if waited_for_older and policy.rule is not CatchUp.COLLECT_ALL:
        policy = Policy(CatchUp.COLLECT_ALL, SHORTEST_GAP.days)
    coming = is_due(subscription, now) and not cancellation_is_due(subscription)
    latest = missed[-1] if missed[-1].number == newest and not coming else None
    return _decided(subscription, missed, latest, policy, now, diary, AGE_CAP)


def _decided(
    subscription: Subscription,
    periods: Sequence[DuePeriod],
    latest: DuePeriod | None,
    policy: Policy,
    now: datetime,
    diary: Diary,
    age_cap: timedelta,
) -> tuple[tuple[Planned, ...], Diary]:
    planned: list[Planned] = []
    for period in periods:
        decided = decide(policy, period, now, is_latest=period is latest, age_cap=age_cap)
        if decided.action is Action.COLLECT:
            decided = place(decided, policy, now, diary, subscription)
            if decided.at is not None and decided.at - period.start > age_cap:
                decided = _too_old(period, age_cap)  # on its debit day
            else:
                diary = diary.with_debit(decided.at or now)
        planned.append(decided)
    return tuple(planned), diary


def _due_periods(subscription: Subscription, now: datetime) -> tuple[list[DuePeriod], Subscription]:
    periods: list[DuePeriod] = []
    while len(periods) < MAX_PLANNED_PERIODS and is_due(subscription, now):
        if cancellation_is_due(subscription):
            return periods, lifecycle.cancelled(subscription)
        period, subscription = open_next_period(subscription, now)
        periods.append(period)
    return periods, subscription


def is_due(subscription: Subscription, now: datetime) -> bool:
    """Whether the next period is due, or a cancellation in its place."""
    return subscription.next_billing_at is not None and subscription.next_billing_at <= now


def cancellation_is_due(subscription: Subscription) -> bool:
    """Whether a cancellation takes effect at or before the start of the next period."""
    start, cancels_at = subscription.next_billing_at, subscription.cancels_at
    return start is not None and cancels_at is not None and start >= cancels_at


# --- which periods ---------------------------------------------------------------------------


def decide(
    policy: Policy,
    period: DuePeriod,
    now: datetime,
    *,
    is_latest: bool,
    age_cap: timedelta = AGE_CAP,
) -> Planned:
    """Apply the policy to one due period. The debit has no date yet: `place` sets it."""
    age = now - period.start
    if is_latest and age <= LATE_AFTER:
        return Planned(period, Action.COLLECT, ON_TIME, None)
    rule = f"{CATCH_UP_RULE}{policy.rule}"
    if policy.rule is CatchUp.HOLD:
        return Planned(period, Action.HOLD, rule, f"{rule}: late; a person decides about it")
    if policy.rule is CatchUp.COLLECT_LATEST and not is_latest:
        reason = f"{WAIVED}{rule}: missed, and a later period is collected"
        return Planned(period, Action.WAIVE, rule, reason)
    if policy.rule is CatchUp.FORGIVE_OLDER_THAN and age > timedelta(days=policy.days or 0):
        reason = f"{WAIVED}{rule}: older than {policy.days} days"
        return Planned(period, Action.WAIVE, rule, reason)
    if age > age_cap:
        return _too_old(period, age_cap)
    return Planned(period, Action.COLLECT, rule, None)


def _too_old(period: DuePeriod, age_cap: timedelta) -> Planned:
    rule = f"{CATCH_UP_RULE}age_cap"
    reason = f"{rule}: older than {age_cap.days} days when it would be debited"
    return Planned(period, Action.HOLD, rule, reason)


# --- when ------------------------------------------------------------------------------------


def place(
    planned: Planned, policy: Policy, now: datetime, diary: Diary, subscription: Subscription
) -> Planned:
    """Set the date of a debit."""
    if planned.rule == ON_TIME:
        return replace(planned, at=now)
    gap = SHORTEST_GAP
    if policy.rule is CatchUp.COLLECT_ALL:
        gap = timedelta(days=policy.days or 0)
    at = _free_moment(now, gap, diary, subscription)
    reason = f"{planned.rule}: {gap.days} day(s) between debits" if at > now else None
    return replace(planned, at=at, reason=reason)


def _free_moment(
    now: datetime, gap: timedelta, diary: Diary, subscription: Subscription
) -> datetime:
    """The first moment from `now` on that keeps the distance to the debits, and to the dates that
    are agreed. These may leave no room at all. Then the debits alone count.
    """
    debits = sorted(diary.debits)
    at = now
    for _ in range(_TRIES):
        at = _after_debits(at, gap, debits)
        free = _after_agreed_date(at, now, gap, subscription)
        if free is None:
            return at
        at = free
    return _after_debits(now, gap, debits)


def _after_debits(at: datetime, gap: timedelta, debits: Sequence[datetime]) -> datetime:
    """Return the first moment from `at` on that keeps the distance to all debits (ascending)."""
    for debit in debits:
        if abs(at - debit) < gap:
            at = debit + gap
    return at


def _after_agreed_date(
    at: datetime, now: datetime, gap: timedelta, subscription: Subscription
) -> datetime | None:
    """When the first agreed date found too close to `at` lets go of it, or None."""
    for date, room in _agreed_dates_around(subscription, at, now, gap):
        if abs(at - date) < room:
            return date + room
    return None


def _agreed_dates_around(
    subscription: Subscription, at: datetime, now: datetime, gap: timedelta
) -> Iterator[tuple[datetime, timedelta]]:
    """Yield the agreed dates on both sides of `at`, each with the distance to keep.

    The distance is `gap` or half the period, whichever is shorter: otherwise daily debits would
    leave no moment between them.
    """
    if subscription.status not in BILLABLE or subscription.next_billing_at is None:
        return
    number = subscription.series_start + subscription.schedule.period_at(at)
    start, end = subscription.period(number)
    room = min(gap, (end - start) / 2)
    for candidate, date in ((number, start), (number + 1, end)):
        if _will_be_charged(subscription, candidate, date) and now - date <= LATE_AFTER:
            yield date, room


def _will_be_charged(subscription: Subscription, number: int, start: datetime) -> bool:
    cancels_at = subscription.cancels_at
    return (
        number >= subscription.next_period
        and not subscription.is_past_end(number, start)
        and (cancels_at is None or start < cancels_at)
    )
