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
from billing_worker.domain.card import backup_of, obstacle
from billing_worker.domain.catch_up import Action, Diary, Plan
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.invoice import reference_for
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import (
    BILLABLE,
    COLLECTABLE,
    ONE_OFF,
    Subscription,
    SubscriptionStatus,
    open_next_period,
)
from billing_worker.persistence import cards, late, outlook, switches
from billing_worker.persistence.rows import readable, trouble_of
from billing_worker.persistence.store import Store

PAGE = 500
"""Customers read at once."""

OPEN = "open"
"""The rule of a charge whose period has been opened before."""

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
            page = outlook.customers_after(connection, last_id, PAGE)
            expected = list(_Page(connection, page, now, until).expected())
        yield from expected
        if len(page) < PAGE:
            return
        last_id = page[-1]


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
        behind = {s.customer_id for s in self._if_armed.values() if catch_up.is_late(s, now)}
        self._diaries = late.diaries(connection, behind, now)
        in_use = {row.card_id for row in self._rows if row.card_id is not None}
        self._doubtful = cards.with_a_past(connection, in_use, now, until)
        asked = {row.customer_id for row in self._rows if row.card_id in self._doubtful}
        self._owned = cards.of_customers(connection, asked)

    def expected(self) -> Iterator[Expected]:
        for row in self._stuck:
            yield _cannot_be_planned(row, None, self._unreadable[row.id])
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
        """In the order in which the sweep takes them."""
        for row in rows:
            subscription = agreed[row.id]
            yield from self._of_open_invoices(row, subscription)
            try:
                plans = list(catch_up.plans(subscription, self._now, diary))
                to_come = list(self._of_periods_to_come(row, plans[-1].after))
            except Exception as error:  # noqa: BLE001 - shown, and the sweep raises the alert
                yield _cannot_be_planned(row, subscription.money, trouble_of(error))
                continue
            for plan in plans:
                yield from self._of_due_periods(row, plan)
            diary = plans[-1].diary
            yield from to_come

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

    def _of_open_invoices(self, row: Row[Any], subscription: Subscription) -> Iterator[Expected]:
        for invoice in self._open.get(row.id, ()):
            at = invoice.next_attempt_at
            yield self._checked(
                row,
                Expected(
                    subscription=row.reference_id,
                    customer=row.customer_reference,
                    invoice=invoice.reference_id,
                    period=invoice.period_number,
                    start=invoice.period_start,
                    at=max(at, self._now) if at else None,
                    money=Money.from_minor(invoice.amount_minor, invoice.currency),
                    rule=OPEN,
                    reason=self._why_open_is_not_charged(invoice, subscription),
                ),
            )

    def _why_open_is_not_charged(self, invoice: Row[Any], subscription: Subscription) -> str | None:
        if invoice.in_flight:
            return "in flight: the gateway is asked what became of it"
        if subscription.status not in COLLECTABLE:
            return f"subscription is {subscription.status}"
        if invoice.next_attempt_at is None:
            return f"held: {invoice.reason}"
        if invoice.next_attempt_at > self._until:
            return "next attempt is later"
        return None

    def _of_due_periods(self, row: Row[Any], plan: Plan) -> Iterator[Expected]:
        for planned in plan.planned:
            number, start = planned.period.number, planned.period.start
            reason = None if planned.action is Action.COLLECT else planned.reason
            if planned.at and planned.at > self._until:
                reason = "next attempt is later"
            yield self._checked(
                row, _of_period(row, plan.before, number, start, planned.rule, reason, planned.at)
            )

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
                    "cancelled by then",
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
        reason=f"cannot be planned: {reason}",
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
        self._charged: dict[str, tuple[int, Money]] = {}
        self._reasons: dict[str, int] = {}

    def add(self, money: Money | None, reason: str | None) -> None:
        if reason is not None or money is None:
            reason = reason or "cannot be read"
            self._reasons[reason] = self._reasons.get(reason, 0) + 1
            return
        count, total = self._charged.get(money.currency, (0, Money.zero(money.currency)))
        self._charged[money.currency] = (count + 1, total + money)

    def as_dict(self) -> dict[str, Any]:
        return {
            "charged": [
                {"currency": currency, "count": count, "amount": f"{total.amount:f}"}
                for currency, (count, total) in sorted(self._charged.items())
            ],
            "not_charged": dict(sorted(self._reasons.items())),
        }
