"""What will be charged until a date, from the same functions that the sweep uses.

A preview is a promise that can be checked: `services/deviations.py` holds it against the books
afterwards. What cannot be foreseen is left out: an attempt may be declined and tried again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain import catch_up
from billing_worker.domain.attempt import AttemptStatus, Origin
from billing_worker.domain.card import backup_of, obstacle
from billing_worker.domain.catch_up import Action, Diary, Plan, Planned
from billing_worker.domain.dunning import ASKED_FOR, LADDER_ORIGINS
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.invoice import Invoice, reference_for
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import (
    BILLABLE,
    COLLECTABLE,
    ONE_OFF,
    DuePeriod,
    Subscription,
    SubscriptionStatus,
    open_next_period,
)
from billing_worker.persistence import cards, late, outlook, switches
from billing_worker.persistence.claims import AFTER_OLDER, DueInvoice, UnreadableInvoice
from billing_worker.persistence.outlook import OpenInvoices
from billing_worker.persistence.rows import readable, trouble_of
from billing_worker.persistence.store import Store
from billing_worker.services.overdue import TROUBLE

PAGE = 500
"""Customers read at once."""

OPEN = "open"
"""The rule of a charge whose period has been opened before, unless it was missed."""

IN_FLIGHT = "in flight: the gateway is asked what became of it"
PAGE_OPEN = "a page for it is open: the customer decides"
LATER = "next attempt is later"
CANCELLED_BY_THEN = "cancelled by then"
UNPLANNED = "cannot be planned: "
UNREADABLE = "cannot be read: "

HELD = "held since its import"
CHARGED = "charged"
"""What becomes of a held one if all are armed at once and now."""

_NO_CARD = "no card"


@dataclass(frozen=True, slots=True)
class Expected:
    """One charge that is to come, or the reason why there will be none."""

    subscription: str
    customer: str
    invoice: str
    period: int
    start: datetime  # of the period
    at: datetime | None  # when it is charged; None: it is not, or nobody knows when
    money: Money | None  # None: it cannot be read
    rule: str
    reason: str | None  # why it is not charged; None: it is
    if_armed: str | None = None  # of what is held: CHARGED, or why not even then

    def as_dict(self) -> dict[str, Any]:
        return {
            "subscription": self.subscription,
            "customer": self.customer,
            "invoice": self.invoice,
            "period": self.period,
            "start": self.start.isoformat(),
            "at": self.at.isoformat() if self.at else None,
            "amount": f"{self.money.amount:f}" if self.money else None,
            "currency": self.money.currency if self.money else None,
            "rule": self.rule,
            "charged": self.reason is None,
            "reason": self.reason,
            "if_armed": self.if_armed,
        }


def preview(store: Store, now: datetime, until: datetime) -> Iterator[Expected]:
    """Every charge until and including `until`, customer by customer, in bounded memory.

    Raises InvalidInput on `until` when it has passed.
    """
    if until < now:
        raise InvalidInput("until", "has passed")
    last_id = 0
    while True:
        with store.reading() as connection:
            outlook.at_one_moment(connection)
            page = outlook.customers_after(connection, last_id, PAGE)
            expected = list(_Page(connection, page, now, until).expected())
        yield from expected
        if len(page) < PAGE:
            return
        last_id = page[-1]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the next sweep makes of one agreement."""

    plans: Sequence[Plan]
    to_come: Sequence[Expected]
    trouble: str | None = None  # why it cannot be planned

    def after(self, before: Subscription) -> Subscription:
        return self.plans[-1].after if self.plans else before


@dataclass(frozen=True, slots=True)
class _Missed:
    """First charges of one subscription that are to be decided about again."""

    at: datetime  # when
    items: Sequence[DueInvoice]  # oldest first


_NOTHING_OPEN = OpenInvoices([], [])


class _Page:
    """The agreements of some customers, read once."""

    def __init__(
        self, connection: Connection, customer_ids: Sequence[int], now: datetime, until: datetime
    ) -> None:
        self._now, self._until = now, until
        self._sales_on = switches.sales_are_on(connection)
        rows = outlook.agreements_of(connection, customer_ids)
        self._open = outlook.open_invoices_of(connection, customer_ids)
        agreed, unreadable = readable(rows)
        self._agreed = {subscription.id: subscription for subscription in agreed}
        self._unreadable = {row.id: row.reason for row in unreadable}
        self._rows = [row for row in rows if row.id in self._agreed]
        self._stuck = [row for row in rows if row.id in self._unreadable]
        self._if_armed = {row.id: _armed(row, self._agreed[row.id]) for row in self._rows}
        self._missed = self._missed_first_charges()
        self._newest = late.newest_periods(connection, self._missed) if self._missed else {}
        behind = {s.customer_id for s in self._if_armed.values() if catch_up.is_late(s, now)}
        behind |= {self._agreed[subscription_id].customer_id for subscription_id in self._missed}
        self._diaries = late.diaries(connection, behind, now)
        in_use = {row.card_id for row in self._rows if row.card_id is not None}
        self._doubtful = cards.with_a_past(connection, in_use, now, until)
        asked = {row.customer_id for row in self._rows if row.card_id in self._doubtful}
        self._owned = cards.of_customers(connection, asked)

    def _missed_first_charges(self) -> dict[int, _Missed]:
        """By subscription, what `overdue.decide_again` will decide about as soon as one of them is
        rung for. While sales are off, and while an older one is recovered, none is.
        """
        if not self._sales_on:
            return {}
        found: dict[int, _Missed] = {}
        for subscription_id, open_ in self._open.items():
            items = open_.readable
            rung = [max(i.invoice.ring_at or self._now, self._now) for i in items]
            claimed = [
                at
                for item, at in zip(items, rung, strict=True)
                if not item.after_older and _is_missed(item, at)
            ]
            if claimed and subscription_id in self._agreed:
                at = min(claimed)
                found[subscription_id] = _Missed(at, [i for i in items if _is_missed(i, at)])
        return found

    def expected(self) -> Iterator[Expected]:
        for row in self._stuck:
            yield _cannot_be_planned(row, None, self._unreadable[row.id])
            yield from self._of_open_ones_of_stuck(row, self._unreadable[row.id])
        for customer_id, group in groupby(self._rows, key=lambda row: row.customer_id):
            rows = list(group)
            diary = self._diaries.get(customer_id, Diary())
            live = [row for row in rows if not _is_held(row)]
            yield from self._of_agreements(live, self._agreed, diary)
            if len(live) < len(rows):
                yield from self._of_held(rows, diary)

    def _of_agreements(
        self, rows: Sequence[Row[Any]], agreed: Mapping[int, Subscription], diary: Diary
    ) -> Iterator[Expected]:
        """First what is due is opened, in the order in which the sweep takes it; then what is open
        is charged, and what of it was missed is decided about.
        """
        outcomes: dict[int, _Outcome] = {}
        for row in rows:
            outcomes[row.id], diary = self._outcome(row, agreed[row.id], diary)
        again = self._decided_again(rows, agreed, outcomes, diary)
        for row in rows:
            outcome = outcomes[row.id]
            if open_ := self._open.get(row.id):
                yield from self._of_open_invoices(row, outcome.after(agreed[row.id]), open_, again)
            if outcome.trouble is not None:
                yield _cannot_be_planned(row, agreed[row.id].money, outcome.trouble)
            for plan in outcome.plans:
                yield from self._of_due_periods(row, plan, outcome.after(agreed[row.id]))
            yield from outcome.to_come

    def _outcome(
        self, row: Row[Any], subscription: Subscription, diary: Diary
    ) -> tuple[_Outcome, Diary]:
        plans: list[Plan] = []
        after = subscription
        try:
            if catch_up.is_due(subscription, self._now):
                plans = list(catch_up.plans(subscription, self._now, diary))
                after, diary = plans[-1].after, plans[-1].diary
            to_come = list(self._of_periods_to_come(row, after))
        except Exception as error:  # noqa: BLE001 - shown, and the sweep raises the alert
            return _Outcome(plans, (), trouble_of(error)), diary
        return _Outcome(plans, to_come), diary

    def _decided_again(
        self,
        rows: Sequence[Row[Any]],
        agreed: Mapping[int, Subscription],
        outcomes: Mapping[int, _Outcome],
        diary: Diary,
    ) -> dict[int, Planned]:
        """By invoice: what becomes of it as `overdue.decide_again` has it, once the due periods of
        the customer are opened.
        """
        missed = [row.id for row in rows if row.id in self._missed]
        missed.sort(key=lambda subscription_id: (self._missed[subscription_id].at, subscription_id))
        if not missed:
            return {}
        after = {row.id: outcomes[row.id].after(agreed[row.id]) for row in rows}
        dated = [s for s in after.values() if s.next_billing_at is not None]
        diary = replace(diary, calendars=tuple(sorted(dated, key=lambda s: s.id)))
        found: dict[int, Planned] = {}
        for subscription_id in missed:
            if after[subscription_id].status not in COLLECTABLE:
                continue
            opened = [p for plan in outcomes[subscription_id].plans for p in plan.planned]
            newest = max([self._newest[subscription_id], *(p.period.number for p in opened)])
            planned, diary = _planned_again(
                self._missed[subscription_id], newest, after[subscription_id], diary
            )
            found |= planned
        return found

    def _of_held(self, rows: Sequence[Row[Any]], diary: Diary) -> Iterator[Expected]:
        """All of the customer's are planned anew: late debits keep their distance to each other."""
        agreed = self._if_armed
        due = [row for row in rows if agreed[row.id].next_billing_at is not None]
        due.sort(key=lambda row: (agreed[row.id].next_billing_at, row.id))
        calendars = tuple(agreed[row.id] for row in sorted(due, key=lambda row: row.id))
        held = {row.reference_id for row in rows if _is_held(row)}
        for line in self._of_agreements(due, agreed, replace(diary, calendars=calendars)):
            if line.subscription in held:
                yield replace(line, reason=HELD, if_armed=line.reason or CHARGED)

    def _of_open_invoices(
        self,
        row: Row[Any],
        subscription: Subscription,
        open_: OpenInvoices,
        again: Mapping[int, Planned],
    ) -> Iterator[Expected]:
        for broken in open_.unreadable:
            yield _cannot_be_read(row, broken)
        for item in open_.readable:
            planned = again.get(item.invoice.id)
            at = planned.at if planned else item.invoice.next_attempt_at
            reason = self._why_open_is_not_charged(item, subscription, planned, at)
            expected = _of_open_invoice(row, item.invoice, planned, reason)
            yield self._checked(row, replace(expected, at=max(at, self._now) if at else None))

    def _of_open_ones_of_stuck(self, row: Row[Any], trouble: str) -> Iterator[Expected]:
        open_ = self._open.get(row.id, _NOTHING_OPEN)
        for broken in open_.unreadable:
            yield _cannot_be_read(row, broken)
        for item in open_.readable:
            yield _of_open_invoice(row, item.invoice, None, UNPLANNED + trouble)

    def _why_open_is_not_charged(
        self,
        item: DueInvoice,
        subscription: Subscription,
        planned: Planned | None,
        at: datetime | None,
    ) -> str | None:
        taken = _why_nobody_charges(item, subscription)
        if taken is not None:
            return taken
        if planned is not None and planned.action is not Action.COLLECT:
            return planned.reason
        if at is None:
            return f"held: {item.invoice.reason}"
        if reason := self._why_not_on(at, subscription):
            return reason
        waits = item.after_older and item.invoice.next_origin in LADDER_ORIGINS
        return AFTER_OLDER if waits else None

    def _of_due_periods(self, row: Row[Any], plan: Plan, after: Subscription) -> Iterator[Expected]:
        for planned in plan.planned:
            number, start = planned.period.number, planned.period.start
            reason = None if planned.action is Action.COLLECT else planned.reason
            if planned.at is not None:
                reason = self._why_not_on(planned.at, after)
            yield self._checked(
                row, _of_period(row, plan.before, number, start, planned.rule, reason, planned.at)
            )

    def _why_not_on(self, at: datetime, subscription: Subscription) -> str | None:
        """What stands against a date: a cancellation voids what is open."""
        if subscription.status is SubscriptionStatus.CANCELLED:
            return f"subscription is {subscription.status}"
        if at > self._until:
            return LATER
        leaves = subscription.cancels_at
        return CANCELLED_BY_THEN if leaves is not None and at >= leaves else None

    def _of_periods_to_come(self, row: Row[Any], subscription: Subscription) -> Iterator[Expected]:
        """Walk on as the sweep will, period by period, and say in the end why it goes no further."""
        while (at := subscription.next_billing_at) is not None and at <= self._until:
            if catch_up.cancellation_is_due(subscription):
                yield _of_period(
                    row,
                    subscription,
                    subscription.next_period,
                    at,
                    "lifecycle",
                    CANCELLED_BY_THEN,
                )
                return
            period, following = open_next_period(subscription, at)
            yield self._checked(
                row,
                _of_period(row, subscription, period.number, at, catch_up.ON_TIME, None, at),
            )
            subscription = following
        if subscription.next_billing_at is None and row.kind != ONE_OFF:
            yield from self._why_nothing_follows(row, subscription)

    def _why_nothing_follows(self, row: Row[Any], subscription: Subscription) -> Iterator[Expected]:
        """The first period that would begin by then, if there is one."""
        number = max(subscription.next_period, subscription.first_number_from(self._now))
        start = subscription.start_of(number)
        if start > self._until:
            return
        reason = f"subscription is {subscription.status}"
        if subscription.status is SubscriptionStatus.ENDED:
            reason = "all its periods have been billed"
        yield _of_period(row, subscription, number, start, "lifecycle", reason)

    def _checked(self, row: Row[Any], expected: Expected) -> Expected:
        """What stops any charge, however due it is."""
        if expected.reason is not None:
            return expected
        reason = self._why_no_card(row, expected.at or self._now)
        if reason is None and not self._sales_on:
            reason = switches.SALES_OFF
        return replace(expected, reason=reason) if reason else expected

    def _why_no_card(self, row: Row[Any], at: datetime) -> str | None:
        if row.card_id is None:
            return _NO_CARD
        card = self._doubtful.get(row.card_id)
        if card is None or backup_of(card, self._owned.get(row.customer_id, ()), at) is not None:
            return None
        return obstacle(card, at)


def needs_a_card(reason: str) -> bool:
    """Whether another card is all that it takes."""
    return reason == _NO_CARD or reason.startswith("card_")


def _is_held(row: Row[Any]) -> bool:
    return bool(row.held) and row.status in BILLABLE


def _armed(row: Row[Any], subscription: Subscription) -> Subscription:
    """As it will be once nobody holds it."""
    if not _is_held(row):
        return subscription
    return replace(subscription, next_billing_at=subscription.start_of(subscription.next_period))


def _cannot_be_planned(row: Row[Any], money: Money | None, reason: str) -> Expected:
    return Expected(
        subscription=row.reference_id,
        customer=row.customer_reference,
        invoice=reference_for(row.reference_id, row.next_period),
        period=row.next_period,
        start=row.next_billing_at or row.anchor_at,
        at=None,
        money=money,
        rule="lifecycle",
        reason=UNPLANNED + reason,
    )


def _why_nobody_charges(item: DueInvoice, subscription: Subscription) -> str | None:
    """Whatever its date."""
    live = item.live
    if live is not None and live.status is AttemptStatus.SUBMITTED:
        return IN_FLIGHT
    asked_for = item.invoice.next_origin in ASKED_FOR
    suspended = subscription.status is SubscriptionStatus.SUSPENDED
    if subscription.status not in COLLECTABLE and not (asked_for and suspended):
        return f"subscription is {subscription.status}"
    return PAGE_OPEN if live is not None and live.origin is Origin.LINK else None


def _is_missed(item: DueInvoice, now: datetime) -> bool:
    """Missed, and nobody drives it, and no page for it is in front of the customer."""
    live = item.live
    free = live is None or (
        live.status is AttemptStatus.PREPARED
        and live.origin is not Origin.LINK
        and (live.lease_until is None or live.lease_until <= now)
    )
    return free and catch_up.was_missed(item.invoice, item.attempts, now)


def _planned_again(
    missed: _Missed, newest: int, subscription: Subscription, diary: Diary
) -> tuple[dict[int, Planned], Diary]:
    """By invoice, in the groups and the order in which `overdue.decide_again` has them."""
    found: dict[int, Planned] = {}
    before = diary
    try:
        for waited in (True, False):
            group = [i for i in missed.items if (i.invoice.reason == AFTER_OLDER) is waited]
            if group:
                planned, diary = catch_up.plan_missed(
                    [_period_of(item.invoice) for item in group],
                    newest, subscription, missed.at, diary, waited_for_older=waited,
                )  # fmt: skip
                found |= {i.invoice.id: one for i, one in zip(group, planned, strict=True)}
    except Exception as error:  # noqa: BLE001 - shown, and the sweep raises the alert
        reason = f"{TROUBLE}: {trouble_of(error)}"
        held = {
            item.invoice.id: Planned(_period_of(item.invoice), Action.HOLD, TROUBLE, reason)
            for item in missed.items
        }
        return held, before
    return found, diary


def _period_of(invoice: Invoice) -> DuePeriod:
    return DuePeriod(invoice.period_number, invoice.period_start, invoice.period_end)


def _cannot_be_read(row: Row[Any], invoice: UnreadableInvoice) -> Expected:
    return Expected(
        subscription=row.reference_id,
        customer=row.customer_reference,
        invoice=invoice.reference_id,
        period=invoice.period_number,
        start=invoice.period_start,
        at=None,
        money=None,
        rule=OPEN,
        reason=UNREADABLE + invoice.reason,
    )


def _of_open_invoice(
    row: Row[Any], invoice: Invoice, planned: Planned | None, reason: str | None
) -> Expected:
    return Expected(
        subscription=row.reference_id,
        customer=row.customer_reference,
        invoice=invoice.reference_id,
        period=invoice.period_number,
        start=invoice.period_start,
        at=None,
        money=invoice.money,
        rule=planned.rule if planned else OPEN,
        reason=reason,
    )


def _of_period(
    row: Row[Any],
    subscription: Subscription,
    number: int,
    start: datetime,
    rule: str,
    reason: str | None,
    at: datetime | None = None,
) -> Expected:
    return Expected(
        subscription=subscription.reference_id,
        customer=row.customer_reference,
        invoice=reference_for(subscription.reference_id, number),
        period=number,
        start=start,
        at=at,
        money=subscription.money,
        rule=rule,
        reason=reason,
    )


class Totals:
    """Counts and sums while the lines pass by."""

    def __init__(self) -> None:
        self._now = _Sums()
        self._if_armed = _Sums()

    def add(self, expected: Expected) -> None:
        self._now.add(expected.money, expected.reason)
        if expected.if_armed is not None:
            reason = None if expected.if_armed == CHARGED else expected.if_armed
            self._if_armed.add(expected.money, reason)

    def as_dict(self) -> dict[str, Any]:
        """{charged: [{currency, count, amount}], not_charged: {reason: count}}; and under
        `if_armed` the same of what is held, if anything is.
        """
        held = self._if_armed.as_dict()
        return self._now.as_dict() | ({"if_armed": held} if any(held.values()) else {})


class _Sums:
    def __init__(self) -> None:
        self._charged: dict[str, tuple[int, int]] = {}  # how many, and minor units
        self._reasons: dict[str, int] = {}

    def add(self, money: Money | None, reason: str | None) -> None:
        if reason is not None or money is None:
            reason = reason or "cannot be read"
            self._reasons[reason] = self._reasons.get(reason, 0) + 1
            return
        count, minor = self._charged.get(money.currency, (0, 0))
        self._charged[money.currency] = (count + 1, minor + money.minor)

    def as_dict(self) -> dict[str, Any]:
        return {
            "charged": [
                {"currency": currency, "count": count,
                 "amount": f"{Money.from_minor(minor, currency).amount:f}"}
                for currency, (count, minor) in sorted(self._charged.items())
            ],
            "not_charged": dict(sorted(self._reasons.items())),
        }  # fmt: skip
