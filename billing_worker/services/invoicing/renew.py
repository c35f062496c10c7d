"""Opens invoices for due subscriptions: to be charged now or later, waived, or held for a person.

A subscription that cannot be read or planned (a bug, a removed zone or currency) stops no other. It
is reported once, left alone for a while, and tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection

from billing_worker.domain import catch_up, lifecycle
from billing_worker.domain.catch_up import Action, Diary, Plan, Planned
from billing_worker.domain.catch_up_policy import Policy
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.persistence import catch_up as catch_up_rows
from billing_worker.persistence import history, invoices, subscriptions, switches
from billing_worker.persistence.history import Entry
from billing_worker.persistence.rows import Unreadable, trouble_of
from billing_worker.services.doorbell import ring_for
from billing_worker.services.guards import lost_memory
from billing_worker.services.invoicing.pause_collection import Moment, end_at_its_date, give_up
from billing_worker.services.ports import Ports

RENEW_BATCH = 500
MAX_BATCHES = 20
"""One sweep takes at most 10,000 subscriptions; the next one continues."""

MAX_ROWS = 5_000
"""Most rows in one transaction: after a year's outage 500 daily subscriptions would be 180,000."""

MESSAGE_LOST_AFTER = timedelta(seconds=60)

PLAN_AGAIN_AFTER = timedelta(hours=1)
"""Time until an unplannable subscription is tried again: a person or a later version mends it."""

BY = "renew"

log = structlog.get_logger()


def renew_due(ports: Ports) -> int:
    """Open every due period and wake workers for those that are charged now.

    Returns the number of periods. Safe to run twice, concurrently, or not for days: due is
    `next_billing_at <= now`, invoices and next date are committed together, and late periods follow
    the catch-up policy. While the book waits for lost decisions no period is opened, because one of
    them may have prevented it.
    """
    if not lost_memory.poll(ports):
        return 0
    total = 0
    _let_leave(ports)
    _let_resume(ports)
    for _ in range(MAX_BATCHES):
        opened, more = _renew_batch(ports)
        ring_for(ports, opened.to_charge)
        total += opened.periods
        if not more:
            break
    return total


def _renew_batch(ports: Ports) -> tuple[Opened, bool]:
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        if switches.waits_for_decisions(connection):
            return Opened(0, [], still_due=False), False
        claimed, unreadable = subscriptions.claim_due(connection, now, RENEW_BATCH)
        trouble = [_unread(row) for row in unreadable]
        plans = within_limits(plans_for(connection, claimed, now, trouble=trouble))
        enqueue_at = now + max(ports.timings.stuck_after, MESSAGE_LOST_AFTER)
        opened = open_planned(connection, plans, Moment(now, BY), enqueue_at)
        _put_off(connection, trouble, now)
    found = len(claimed) + len(unreadable)
    more = found == RENEW_BATCH or len(plans) + len(trouble) < found or opened.still_due
    return opened, more


def _let_leave(ports: Ports) -> None:
    """Carry out dated cancellations of subscriptions without a next period."""
    with ports.store.transaction() as connection:
        if switches.waits_for_decisions(connection):
            return
        moment = Moment(ports.clock.now(), BY)
        leaving, unreadable = subscriptions.claim_leaving(connection, moment.now, RENEW_BATCH)
        for subscription in leaving:
            over = lifecycle.cancelled(subscription)
            subscriptions.save(connection, subscription, over)
            _tell_cancelled(connection, over, moment)
        _put_off(connection, [_unread(row) for row in unreadable], moment.now)


def _let_resume(ports: Ports) -> None:
    """End the pauses whose date has come."""
    with ports.store.transaction() as connection:
        if switches.waits_for_decisions(connection):
            return
        moment = Moment(ports.clock.now(), BY)
        resuming, unreadable = subscriptions.claim_resuming(connection, moment.now, RENEW_BATCH)
        for paused in resuming:
            end_at_its_date(connection, paused, moment)
        _put_off(connection, [_unread(row) for row in unreadable], moment.now)


# --- what cannot be planned ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why one subscription cannot be planned."""

    subscription_id: int
    reference_id: str
    reason: str
    told: bool = False  # in an earlier sweep


def _unread(row: Unreadable) -> Trouble:
    return Trouble(row.id, row.reference_id, row.reason, told=row.trouble == row.reason)


def _put_off(connection: Connection, trouble: Sequence[Trouble], now: datetime) -> None:
    again = now + PLAN_AGAIN_AFTER
    subscriptions.put_off(connection, [(t.subscription_id, t.reason) for t in trouble], again)
    untold = [t for t in trouble if not t.told]
    for one in untold:
        log.error("billing.alert", kind=str(EventKind.SUBSCRIPTION_STUCK),
                  subscription=one.reference_id, reason=one.reason)  # fmt: skip
    history.write(
        connection,
        (
            Entry(
                Event(EventKind.SUBSCRIPTION_STUCK, now, BY, {"reason": t.reason}, alert=True),
                t.subscription_id,
            )
            for t in untold
        ),
    )


@dataclass(frozen=True, slots=True)
class Opened:
    periods: int
    to_charge: list[int]  # invoice ids
    still_due: bool  # a subscription had more periods than one transaction opens


def plans_for(
    connection: Connection,
    due: Sequence[Subscription],
    now: datetime,
    *,
    policy: Policy | None = None,
    trouble: list[Trouble] | None = None,
) -> Iterator[Plan]:
    """Plan due subscriptions. The caller locks them if it will write.

    A subscription that cannot be planned is skipped and added to `trouble`; without that list it
    raises.
    """
    late = {s.id for s in due if catch_up.is_late(s, now)}
    diaries = catch_up_rows.diaries(connection, late, now)
    for subscription in due:
        diary = diaries.get(subscription.id, Diary())
        try:
            yield catch_up.plan(subscription, now, diary, policy)
        except Exception as error:
            if trouble is None:
                raise
            trouble.append(_unplanned(connection, subscription, error))


def _unplanned(connection: Connection, subscription: Subscription, error: Exception) -> Trouble:
    reason = trouble_of(error)
    told = subscriptions.trouble_told(connection, subscription.id) == reason
    return Trouble(subscription.id, subscription.reference_id, reason, told=told)


def within_limits(plans: Iterable[Plan]) -> list[Plan]:
    taken: list[Plan] = []
    rows = 0
    for plan in plans:
        taken.append(plan)
        rows += len(plan.planned)
        if rows >= MAX_ROWS:
            break
    return taken


def open_planned(
    connection: Connection, plans: Sequence[Plan], moment: Moment, enqueue_at: datetime
) -> Opened:
    """Write the plans of locked subscriptions."""
    due = [(plan.before, planned) for plan in plans for planned in plan.planned]
    rows = invoices.open_periods(connection, due, moment.now, enqueue_at)
    subscriptions.advance(connection, [(plan.before, plan.after) for plan in plans])
    by_period = {(s.id, planned.period.number): (s, planned) for s, planned in due}
    history.write(
        connection,
        (
            Entry(_said(*by_period[subscription_id, number], moment), subscription_id, invoice_id)
            for invoice_id, subscription_id, number in rows
        ),
    )
    for plan in plans:
        _tell_about(connection, plan, moment)
    return Opened(
        len(rows),
        [row[0] for row in rows if by_period[row[1], row[2]][1].at == moment.now],
        any(catch_up.is_due(plan.after, moment.now) for plan in plans),
    )


def _tell_about(connection: Connection, plan: Plan, moment: Moment) -> None:
    held = [planned for planned in plan.planned if planned.action is Action.HOLD]
    if held:
        # One alert for all of them: a person decides once about the subscription.
        data = {
            "periods": [held[0].period.number, held[-1].period.number],
            "count": len(held),
            "rules": sorted({planned.rule for planned in held}),
            "each": " or ".join(dict.fromkeys(_price(plan.before, one) for one in held)),
        }
        said = Event(EventKind.CATCH_UP_HELD, moment.now, moment.by, data, alert=True)
        history.write(connection, [Entry(said, plan.before.id)])
    if plan.before.new_amount_from != plan.after.new_amount_from:
        _tell_repriced(connection, plan, moment)
    if plan.after.status is SubscriptionStatus.CANCELLED:
        _tell_cancelled(connection, plan.after, moment)


def _tell_repriced(connection: Connection, plan: Plan, moment: Moment) -> None:
    since = plan.before.new_amount_from
    assert since is not None  # noqa: S101 - only a date that has come is taken away
    first = next(one.period for one in plan.planned if one.period.start >= since)
    said = moment.event(
        EventKind.SUBSCRIPTION_REPRICED,
        amount=str(plan.after.money),
        was=str(plan.before.money),
        agreed_from=since,
        from_period=first.number,
    )
    history.write(connection, [Entry(said, plan.before.id)])


def _price(subscription: Subscription, planned: Planned) -> str:
    return str(subscription.price_at(planned.period.start))


def _tell_cancelled(connection: Connection, over: Subscription, moment: Moment) -> None:
    voided = give_up(connection, over.id, moment)
    said = moment.event(EventKind.SUBSCRIPTION_CANCELLED, at_period_end=True, voided=voided)
    history.write(connection, [Entry(said, over.id)])


def _said(subscription: Subscription, planned: Planned, moment: Moment) -> Event:
    waived = planned.action is Action.WAIVE
    kind = EventKind.INVOICE_VOIDED if waived else EventKind.INVOICE_OPENED
    data = _why_due(subscription, planned)
    if planned.rule != catch_up.ON_TIME:
        data["catch_up"] = {
            "action": planned.action,
            "rule": planned.rule,
            "reason": planned.reason,
            "at": planned.at.isoformat() if planned.at else None,
        }
    if subscription.is_past_end(planned.period.number + 1, planned.period.end):
        data["last_period"] = True
    return moment.event(kind, **data)


def _why_due(subscription: Subscription, planned: Planned) -> dict[str, object]:
    schedule, period = subscription.schedule, planned.period
    nth = period.number - subscription.series_start
    return {
        "rule": f"boundary {nth} of every {schedule.count} {schedule.unit}",
        "anchor_at": schedule.anchor,
        "timezone": schedule.tz,
        "period": [period.start.isoformat(), period.end.isoformat()],
        "amount": str(subscription.price_at(period.start)),
    }
