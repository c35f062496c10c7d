"""Shows late periods, and applies a person's decision about them.

The sweep applies each subscription's policy by itself. Here the same plan is shown beforehand (stop
sales or beat to have the time), applied under limits, and held periods are decided by a policy that
a named person chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain import catch_up
from billing_worker.domain.catch_up import AGE_CAP, Action, Diary, Plan, Planned
from billing_worker.domain.catch_up_policy import CatchUp, Policy
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import Invoice, reference_for
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import DuePeriod, Subscription
from billing_worker.persistence import catch_up as catch_up_rows
from billing_worker.persistence import history, switches
from billing_worker.persistence.catch_up import LateOf, LateSubscription
from billing_worker.persistence.history import Entry
from billing_worker.persistence.rows import trouble_of
from billing_worker.persistence.store import Store
from billing_worker.persistence.switches import WAITS
from billing_worker.services.invoicing.missed_charges import TROUBLE
from billing_worker.services.invoicing.pause_collection import Moment
from billing_worker.services.invoicing.renew import open_planned

CUSTOMER_BATCH = 50
"""Customers in one transaction."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A person's decision in place of the subscriptions' own policies. `policy` None: no
    decision.
    """

    policy: Policy | None = None
    age_cap: timedelta = AGE_CAP

    def __post_init__(self) -> None:
        if self.policy is not None and self.policy.rule is CatchUp.HOLD:
            raise InvalidInput("policy", "hold decides nothing")


@dataclass(frozen=True, slots=True)
class Line:
    """One due or held period, and what becomes of it."""

    subscription: str
    customer: str
    invoice: str
    period: int
    start: datetime
    money: Money | None  # None: it is unreadable and cannot be planned
    planned: Planned

    def as_dict(self) -> dict[str, Any]:
        at = self.planned.at
        return {
            "subscription": self.subscription,
            "customer": self.customer,
            "invoice": self.invoice,
            "period": self.period,
            "start": self.start.isoformat(),
            "amount": f"{self.money.amount:f}" if self.money else None,
            "currency": self.money.currency if self.money else None,
            "action": str(self.planned.action),
            "at": at.isoformat() if at else None,
            "rule": self.planned.rule,
            "reason": self.planned.reason,
        }


def plan(store: Store, now: datetime, answer: Answer) -> Iterator[Line]:
    """Yield what becomes of every due and every held period, by customer. Writes nothing."""
    last_id = 0
    while True:
        with store.reading() as connection:
            page = catch_up_rows.customers_with_late(connection, now, last_id, CUSTOMER_BATCH)
            lines = [
                line
                for customer in _planned(connection, page, Moment(now, ""), answer, lock=False)
                for line in customer.lines()
            ]
        yield from lines
        if len(page) < CUSTOMER_BATCH:
            return
        last_id = page[-1]


# --- doing it --------------------------------------------------------------------------------


@dataclass(slots=True)
class Caps:
    """Limits for all debits together. Stops before the first customer who would exceed one.

    With an amount for any currency, the other currencies are not debited.
    """

    max_count: int | None = None
    max_amount: Mapping[str, Money] = field(default_factory=dict)
    count: int = 0
    amount: dict[str, Money] = field(default_factory=dict)

    def take(self, lines: Sequence[Line]) -> bool:
        """Count the debits among the lines, or refuse all of them."""
        collected = [line for line in lines if line.planned.action is Action.COLLECT]
        debits = [line.money for line in collected if line.money is not None]
        count, amount = self.count + len(debits), dict(self.amount)
        for money in debits:
            amount[money.currency] = amount.get(money.currency, Money.zero(money.currency)) + money
        if self.max_count is not None and count > self.max_count:
            return False
        if self.max_amount and any(self._passes(total) for total in amount.values()):
            return False
        self.count, self.amount = count, amount
        return True

    def _passes(self, total: Money) -> bool:
        return total > self.max_amount.get(total.currency, Money.zero(total.currency))


@dataclass(frozen=True, slots=True)
class Applied:
    lines: list[Line]
    complete: bool  # False: a limit was reached, and the rest is unchanged


def apply(
    store: Store,
    clock: Clock,
    answer: Answer,
    caps: Caps,
    *,
    by: str,
    why: str | None = None,
) -> Applied:
    """Do what `plan` shows, customer by customer in its order, until done or at a limit.

    The sweep wakes workers for due invoices. Idempotent: decided periods are neither due nor held
    any more. Raises InvalidInput on `restored` while the book waits for lost decisions.
    """
    if not by:
        raise InvalidInput("by", "must name who decides")
    with store.reading() as connection:
        if switches.waits_for_decisions(connection):
            raise InvalidInput("restored", WAITS)
    done: list[Line] = []
    last_id = 0
    while True:
        with store.transaction() as connection:
            moment = Moment(clock.now(), by)
            page = catch_up_rows.customers_with_late(
                connection, moment.now, last_id, CUSTOMER_BATCH
            )
            for customer in _planned(connection, page, moment, answer, lock=True):
                lines = list(customer.lines())
                if not caps.take(lines):
                    return Applied(done, complete=False)
                customer.write(connection, moment, why)
                done += lines
        if len(page) < CUSTOMER_BATCH:
            return Applied(done, complete=True)
        last_id = page[-1]


@dataclass(slots=True)
class _Customer:
    """The plan for one customer."""

    reference: str
    held: list[tuple[Subscription, Invoice, Planned]] = field(default_factory=list)
    due: list[Plan] = field(default_factory=list)
    trouble: list[Line] = field(default_factory=list)  # one for each that cannot be planned

    def lines(self) -> Iterator[Line]:
        for subscription, invoice, planned in self.held:
            yield _line(subscription, self.reference, invoice.money, planned)
        for plan in self.due:
            for planned in plan.planned:
                price = plan.before.price_at(planned.period.start)
                yield _line(plan.before, self.reference, price, planned)
        yield from self.trouble

    def write(self, connection: Connection, moment: Moment, why: str | None) -> None:
        decided = [(i, planned) for _, i, planned in self.held if planned.action is not Action.HOLD]
        catch_up_rows.decide_held(connection, decided)
        history.write(
            connection,
            (
                Entry(
                    moment.event(
                        EventKind.CATCH_UP_DECIDED,
                        action=planned.action,
                        rule=planned.rule,
                        at=planned.at,
                        why=why,
                    ),
                    invoice.subscription_id,
                    invoice.id,
                )
                for invoice, planned in decided
            ),
        )
        open_planned(connection, self.due, moment, enqueue_at=moment.now)


def _line(subscription: Subscription, customer: str, money: Money, planned: Planned) -> Line:
    number = planned.period.number
    return Line(
        subscription.reference_id,
        customer,
        reference_for(subscription.reference_id, number),
        number,
        planned.period.start,
        money,
        planned,
    )


def _planned(
    connection: Connection,
    customer_ids: Sequence[int],
    moment: Moment,
    answer: Answer,
    *,
    lock: bool,
) -> Iterator[_Customer]:
    found = catch_up_rows.late_of(connection, customer_ids, moment.now, lock=lock)
    ids = [one.subscription.id for late in found.values() for one in late.readable]
    diaries = catch_up_rows.diaries(connection, ids, moment.now)
    newest = catch_up_rows.newest_periods(connection, ids)
    for customer_id in customer_ids:
        if customer_id in found:
            yield _planned_for(found[customer_id], diaries, newest, moment.now, answer)


def _planned_for(
    found: LateOf,
    diaries: dict[int, Diary],
    newest: dict[int, int],
    now: datetime,
    answer: Answer,
) -> _Customer:
    customer = _Customer(found.customer_reference)
    for row in found.unreadable:
        start = row.next_billing_at or now
        customer.trouble.append(
            _in_trouble(row.reference_id, found, row.next_period, start, row.reason)
        )
    for one in found.readable:
        if one.held:
            id_ = one.subscription.id
            planned, diaries[id_] = _held(one, newest[id_], diaries[id_], now, answer)
            customer.held += [
                (one.subscription, invoice, item)
                for invoice, item in zip(one.held, planned, strict=True)
            ]
    for one in found.readable:
        agreed = one.subscription
        try:
            diary = diaries[agreed.id]
            plans = list(catch_up.plans(agreed, now, diary, answer.policy, answer.age_cap))
        except Exception as error:  # noqa: BLE001 - shown, and the sweep raises the alert
            start = agreed.next_billing_at or now
            customer.trouble.append(
                _in_trouble(
                    agreed.reference_id, found, agreed.next_period, start, trouble_of(error)
                )
            )
            continue
        customer.due += [plan for plan in plans if plan.planned or plan.after != plan.before]
    return customer


def _in_trouble(reference: str, found: LateOf, number: int, start: datetime, reason: str) -> Line:
    planned = Planned(
        DuePeriod(number, start, start), Action.HOLD, TROUBLE, f"cannot be planned: {reason}"
    )
    invoice = reference_for(reference, number)
    return Line(reference, found.customer_reference, invoice, number, start, None, planned)


def _held(
    one: LateSubscription, newest: int, diary: Diary, now: datetime, answer: Answer
) -> tuple[tuple[Planned, ...], Diary]:
    periods = [DuePeriod(i.period_number, i.period_start, i.period_end) for i in one.held]
    if answer.policy is not None:
        return catch_up.plan_held(
            periods, newest, one.subscription, now, diary, answer.policy, answer.age_cap
        )
    waiting = tuple(
        Planned(period, Action.HOLD, "on_hold", invoice.reason)
        for period, invoice in zip(periods, one.held, strict=True)
    )
    return waiting, diary
