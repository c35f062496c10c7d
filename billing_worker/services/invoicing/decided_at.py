"""A decision that is told of later than it was made: after books are restored, or a full queue.

    decided ──▶ periods become due ──▶ told: they are taken back, and the decision counts from then

What was charged in between stays charged, and the event of the decision names it. The rest becomes
void; a period that is due all the same is opened anew by the sweep, under its number, so that the
gateway is asked about everything that was ever sent for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain import invoice as invoice_rules
from billing_worker.domain import lifecycle as rules
from billing_worker.domain.catch_up import is_due
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import EventKind
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import BILLABLE, Subscription, SubscriptionStatus
from billing_worker.persistence import claims, history, invoices, subscriptions, switches
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.pause_collection import Moment

OLDEST = timedelta(days=366)
"""Oldest accepted decision: an older one is a typing error."""

CLOCKS_DIFFER = timedelta(minutes=1)
"""The caller has another clock: a time up to this far ahead counts as now."""

PERIOD_WAITS = (
    "these books are from a backup, and a period or a pause's end is due that a decision not yet "
    "said again may have prevented: say those first, and with each when it was made"
)

_ORDERED = frozenset(
    {
        EventKind.SUBSCRIPTION_CHANGED,
        EventKind.SUBSCRIPTION_PAUSED,
        EventKind.SUBSCRIPTION_RESUMED,
        EventKind.SUBSCRIPTION_FORGIVEN,
        EventKind.SUBSCRIPTION_CANCELLED,
        EventKind.CANCELLATION_SCHEDULED,
        EventKind.CANCELLATION_WITHDRAWN,
        EventKind.SUBSCRIPTION_ENDED,
    }
)


@dataclass(frozen=True, slots=True)
class Decided:
    """The time of a decision."""

    at: datetime
    told_later: bool
    in_pause: bool = False  # in one that has ended by itself since then


def decided_when(
    connection: Connection,
    subscription: Subscription,
    decided_at: datetime | None,
    now: datetime,
    *,
    is_last: bool = False,
) -> Decided:
    """`decided_at`, or now. Raises InvalidInput on `decided_at` where it cannot be meant.

    Decisions about one subscription are told of in their order: one that is older than the last
    would have to undo it. So would one from a pause that has ended by itself since then, but for the
    last of all (`is_last`: cancelled, ended), after which no date counts. `subscription` is locked.
    """
    if decided_at is None:
        due = is_due(subscription, now) or rules.pause_is_over(subscription, now)
        if due and switches.waits_for_decisions(connection):
            raise InvalidInput("decided_at", PERIOD_WAITS)
        return Decided(now, told_later=False)
    at = not_in_the_future(decided_at, now)
    said = _ordered(connection, subscription.id, _ORDERED)
    by_itself = [row for row in said if "resumed_at" in row.data] if is_last else []
    last = max((_made_at(row) for row in said if row not in by_itself), default=None)
    if last is not None and at < last:
        if at < last - CLOCKS_DIFFER:
            reason = f"is before the last decision about it, which is of {last.isoformat()}"
            raise InvalidInput("decided_at", f"{reason}: tell of them in their order")
        at = last
    in_pause = any(_made_at(row) > at for row in by_itself)
    return Decided(at, told_later=True, in_pause=in_pause)


def not_in_the_future(decided_at: datetime, now: datetime) -> datetime:
    """Raise InvalidInput on `decided_at` for a time in the future, or a typing error."""
    if decided_at > now + CLOCKS_DIFFER:
        raise InvalidInput("decided_at", "is in the future")
    if decided_at < now - OLDEST:
        raise InvalidInput("decided_at", f"is more than {OLDEST.days} days ago")
    return min(decided_at, now)


def last_said(
    connection: Connection, subscription_id: int, kinds: frozenset[EventKind]
) -> datetime | None:
    """Return when the newest of these decisions was made."""
    return max(
        (_made_at(row) for row in _ordered(connection, subscription_id, kinds)), default=None
    )


def _ordered(
    connection: Connection, subscription_id: int, kinds: frozenset[EventKind]
) -> list[Row[Any]]:
    """Return the decisions whose order matters, oldest first."""
    said = history.of_kinds(connection, subscription_id, kinds)
    return [row for row in said if _is_ordered(row)]


def _is_ordered(row: Row[Any]) -> bool:
    """Return whether the order of this decision matters.

    It does not for a dunning policy, which moves no period, for a backup card, which replaces none,
    and for a cancellation that takes effect, which was decided earlier.
    """
    said = row.data
    came_by_itself = said.get("at_period_end")
    return not ("dunning_policy" in said or said.get("role") == "backup" or came_by_itself)


def _made_at(row: Row[Any]) -> datetime:
    """Return when it was made. A pause that ended by itself counts from its date."""
    said: str | None = row.data.get("decided_at") or row.data.get("resumed_at")
    made_at: datetime = datetime.fromisoformat(said) if said else row.at
    return made_at


@dataclass(frozen=True, slots=True)
class TakenBack:
    subscription: Subscription  # as it was at the decision, or as it is if no period became due
    charged: tuple[str, ...] = ()
    """References of invoices that became due since then and are paid or being charged."""


def take_back(
    connection: Connection, subscription: Subscription, at: datetime, moment: Moment
) -> TakenBack:
    """Void what became due after `at` and was not charged.

    `subscription` is locked; it is returned as it was before those periods, and the caller writes
    it. Raises InvalidInput on `decided_at` if a suspension in between was paid off: such a payment
    skips periods, and nobody can tell which.
    """
    if at >= moment.now:
        return TakenBack(subscription)
    rows = [
        row
        for row in invoices.opened_after(connection, subscription.id, at)
        if row.period_number < subscription.next_period and not _is_taken_back(row)
    ]
    if not rows or subscriptions.is_one_off(connection, subscription.id):
        return TakenBack(subscription)
    first = rows[0].period_number
    open_items = claims.lock_open(connection, subscription.id)
    in_flight = {i.invoice.id for i in open_items if pause_collection.is_in_flight(i)}
    charged = tuple(r.reference_id for r in rows if r.status == "paid" or r.id in in_flight)
    if subscription.status not in BILLABLE | {SubscriptionStatus.ENDED}:
        return TakenBack(subscription, charged)
    if len(rows) < subscription.next_period - first:
        raise InvalidInput("decided_at", "periods were skipped since: tell of it as of now")
    _void(connection, rows, moment, [i for i in open_items if i.invoice.period_start > at])
    before = rules.before_period(subscription, first)
    return TakenBack(_at_former_price(connection, before), charged)


def _at_former_price(connection: Connection, subscription: Subscription) -> Subscription:
    """Return it with the amount that one of the periods taken back has brought agreed for later
    again.
    """
    said = _ordered(connection, subscription.id, _ORDERED | {EventKind.SUBSCRIPTION_REPRICED})
    if not said or said[-1].kind != EventKind.SUBSCRIPTION_REPRICED:
        return subscription
    last = said[-1]
    if last.data["from_period"] < subscription.next_period:
        return subscription
    return replace(
        subscription,
        money=Money.parse(*last.data["was"].split()),
        new_amount_minor=subscription.money.minor,
        new_amount_from=datetime.fromisoformat(last.data["agreed_from"]),
    )


def _is_taken_back(row: Row[Any]) -> bool:
    """Whether it is void by an earlier decision. If the next period is later, that one freed it."""
    return (row.status, row.reason) == ("void", invoice_rules.TAKEN_BACK)


def _void(
    connection: Connection,
    rows: Sequence[Row[Any]],
    moment: Moment,
    open_items: Sequence[claims.DueInvoice],
) -> None:
    pause_collection.void(connection, open_items, invoice_rules.TAKEN_BACK, moment)
    invoices.take_back_waived(connection, [row.id for row in rows])
