"""The preview: what will be charged until a date, computed by the functions of the sweep.

A preview can be checked: `services/forecast/variance.py` compares it with the books afterwards. It
leaves out what cannot be foreseen: an attempt may be declined and tried again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain import catch_up, lifecycle
from billing_worker.domain.attempt import AttemptStatus, Origin
from billing_worker.domain.card import payer
from billing_worker.domain.catch_up import Action, Diary, Plan, Planned
from billing_worker.domain.dunning import (
    ASKED_FOR,
    LADDER_ORIGINS,
    comes_too_late,
    policy_named,
)
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.subscription import (
    BILLABLE,
    COLLECTABLE,
    ONE_OFF,
    Subscription,
    SubscriptionStatus,
    open_next_period,
)
from billing_worker.domain.timings import Timings
from billing_worker.persistence import cards, forecast, switches
from billing_worker.persistence import catch_up as catch_up_rows
from billing_worker.persistence.claims import AFTER_OLDER, DueInvoice
from billing_worker.persistence.forecast import OpenInvoices
from billing_worker.persistence.rows import readable, trouble_of
from billing_worker.persistence.store import Store
from billing_worker.services.forecast.line import (
    CANCELLED_BY_THEN,
    CHARGED,
    HANDED_OVER,
    HELD_IMPORT,
    IN_FLIGHT,
    LATER,
    NO_CARD,
    PAGE_OPEN,
    UNPLANNED,
    Expected,
    cannot_be_planned,
    cannot_be_read,
    of_open_invoice,
    of_period,
)
from billing_worker.services.forecast.missed import Missed, decided_again, missed_of
from billing_worker.services.forecast.notices import Notices

PREVIEW_BATCH = 500
"""Customers in one batch."""


def preview(
    store: Store, now: datetime, until: datetime, timings: Timings | None = None
) -> Iterator[Expected]:
    """Yield every charge until and including `until`, customer by customer, in bounded memory.

    Raises InvalidInput on `until` if it has passed.
    """
    if until < now:
        raise InvalidInput("until", "has passed")
    last_id = 0
    while True:
        with store.reading() as connection:
            forecast.at_one_moment(connection)
            page = forecast.customers_after(connection, last_id, PREVIEW_BATCH)
            expected = list(_Page(connection, page, now, until, timings or Timings()).expected())
        yield from expected
        if len(page) < PREVIEW_BATCH:
            return
        last_id = page[-1]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of the next sweep for one subscription."""

    plans: Sequence[Plan]
    to_come: Sequence[Expected]
    diary: Diary  # with the new debits
    trouble: str | None = None  # why it cannot be planned

    @property
    def opened(self) -> Sequence[Planned]:
        return [planned for plan in self.plans for planned in plan.planned]

    def after(self, before: Subscription) -> Subscription:
        return self.plans[-1].after if self.plans else before


_NOTHING_OPEN = OpenInvoices([], [])


class _Page:
    """The subscriptions of a batch of customers, read once."""

    def __init__(
        self,
        connection: Connection,
        customer_ids: Sequence[int],
        now: datetime,
        until: datetime,
        timings: Timings,
    ) -> None:
        self._now, self._until = now, until
        self._unknown_blocks = timings.unknown_blocks
        self._sales_on = switches.sales_are_on(connection)
        rows = forecast.agreements_of(connection, customer_ids)
        self._open = forecast.open_invoices_of(connection, customer_ids)
        agreed, unreadable = readable(rows)
        self._agreed = {subscription.id: subscription for subscription in agreed}
        self._unreadable = {row.id: row.reason for row in unreadable}
        self._rows = [row for row in rows if row.id in self._agreed]
        self._stuck = [row for row in rows if row.id in self._unreadable]
        self._if_armed = {row.id: _armed(row, self._agreed[row.id]) for row in self._rows}
        self._missed = self._missed_first_charges()
        self._newest = (
            catch_up_rows.newest_periods(connection, self._missed) if self._missed else {}
        )
        behind = {s.id for s in self._if_armed.values() if catch_up.is_late(s, now)}
        behind |= self._missed.keys()
        self._diaries = catch_up_rows.diaries(connection, behind, now)
        in_use = {row.card_id for row in self._rows if row.card_id is not None}
        self._doubtful = cards.with_a_past(connection, in_use, now, until)
        asked = {row.customer_id for row in self._rows if row.card_id in self._doubtful}
        self._owned = cards.of_customers(connection, asked)
        self._notices = Notices(connection, self._rows, timings.notices, now)

    def _missed_first_charges(self) -> dict[int, Missed]:
        """Return missed first charges by subscription. They stay undecided while sales are off."""
        if not self._sales_on:
            return {}
        found = {
            subscription_id: missed_of(open_.readable, self._now, self._unknown_blocks)
            for subscription_id, open_ in self._open.items()
            if subscription_id in self._agreed
        }
        return {subscription_id: missed for subscription_id, missed in found.items() if missed}

    def expected(self) -> Iterator[Expected]:
        for row in self._stuck:
            yield cannot_be_planned(row, None, self._unreadable[row.id])
            yield from self._of_open_ones_of_stuck(row, self._unreadable[row.id])
        for row in self._rows:
            if _is_held(row):
                yield from self._of_held(row)
            else:
                yield from self._of_agreement(row, self._agreed[row.id])

    def _of_agreement(self, row: Row[Any], agreed: Subscription) -> Iterator[Expected]:
        """First what is due is opened; then what is open is charged, and what of it was missed is
        decided about.
        """
        outcome = self._outcome(row, agreed)
        after = outcome.after(agreed)
        if open_ := self._open.get(row.id):
            again = self._decided_again(row, outcome, after)
            yield from self._of_open_invoices(row, after, open_, again)
        if outcome.trouble is not None:
            yield cannot_be_planned(row, agreed.money, outcome.trouble)
        for plan in outcome.plans:
            yield from self._of_due_periods(row, plan, after)
        yield from outcome.to_come

    def _outcome(self, row: Row[Any], subscription: Subscription) -> _Outcome:
        plans: list[Plan] = []
        after, diary = subscription, self._diaries.get(row.id, Diary())
        try:
            if catch_up.is_due(subscription, self._now):
                plans = list(catch_up.plans(subscription, self._now, diary))
                after, diary = plans[-1].after, plans[-1].diary
            to_come = list(self._of_periods_to_come(row, after))
        except Exception as error:  # noqa: BLE001 - shown, and the sweep raises the alert
            return _Outcome(plans, (), diary, trouble_of(error))
        return _Outcome(plans, to_come, diary)

    def _decided_again(
        self, row: Row[Any], outcome: _Outcome, after: Subscription
    ) -> Mapping[int, Planned]:
        """By invoice: what becomes of the missed ones once the due periods are opened."""
        missed = self._missed.get(row.id)
        if missed is None:
            return {}
        newest = max([self._newest[row.id], *(p.period.number for p in outcome.opened)])
        return decided_again(missed, newest, after, outcome.diary)

    def _of_held(self, row: Row[Any]) -> Iterator[Expected]:
        """As if it were armed now."""
        for line in self._of_agreement(row, self._if_armed[row.id]):
            yield replace(line, reason=HELD_IMPORT, if_armed=line.reason or CHARGED)

    def _of_open_invoices(
        self,
        row: Row[Any],
        subscription: Subscription,
        open_: OpenInvoices,
        again: Mapping[int, Planned],
    ) -> Iterator[Expected]:
        for broken in open_.unreadable:
            yield cannot_be_read(row, broken)
        for item in open_.readable:
            planned = again.get(item.invoice.id)
            at = planned.at if planned else item.invoice.next_attempt_at
            reason = self._why_open_is_not_charged(item, subscription, planned, at)
            at = max(at, self._now) if at else None
            yield self._checked(row, of_open_invoice(row, item.invoice, planned, reason, at))

    def _of_open_ones_of_stuck(self, row: Row[Any], trouble: str) -> Iterator[Expected]:
        open_ = self._open.get(row.id, _NOTHING_OPEN)
        for broken in open_.unreadable:
            yield cannot_be_read(row, broken)
        for item in open_.readable:
            yield of_open_invoice(row, item.invoice, None, UNPLANNED + trouble)

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
        policy = policy_named(item.dunning_policy)
        over = comes_too_late(policy, item.invoice, item.attempts, max(at, self._now))
        if over is not None:
            return f"held: {over.reason}"
        after_older = item.comes_after_older(max(at, self._now), self._unknown_blocks)
        waits = after_older and item.invoice.next_origin in LADDER_ORIGINS
        return AFTER_OLDER if waits else None

    def _of_due_periods(self, row: Row[Any], plan: Plan, after: Subscription) -> Iterator[Expected]:
        for planned in plan.planned:
            number, start = planned.period.number, planned.period.start
            reason = None if planned.action is Action.COLLECT else planned.reason
            if planned.at is not None:
                reason = self._why_not_on(planned.at, after)
            yield self._checked(
                row, of_period(row, plan.before, number, start, planned.rule, reason, planned.at)
            )

    def _why_not_on(self, at: datetime, subscription: Subscription) -> str | None:
        """Return why there is no charge at this date: a cancellation voids open invoices."""
        if subscription.status is SubscriptionStatus.CANCELLED:
            return f"subscription is {subscription.status}"
        if at > self._until:
            return LATER
        leaves = subscription.cancels_at
        return CANCELLED_BY_THEN if leaves is not None and at >= leaves else None

    def _of_periods_to_come(self, row: Row[Any], subscription: Subscription) -> Iterator[Expected]:
        """Yield lines of later periods, one by one as the sweep opens them, and the reason why they
        end.
        """
        subscription = self._once_resumed(subscription)
        while (at := subscription.next_billing_at) is not None and at <= self._until:
            if catch_up.cancellation_is_due(subscription):
                yield of_period(
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
                of_period(row, subscription, period.number, at, catch_up.ON_TIME, None, at),
            )
            subscription = following
        if subscription.next_billing_at is None and row.kind != ONE_OFF:
            yield from self._why_nothing_follows(row, subscription)

    def _once_resumed(self, subscription: Subscription) -> Subscription:
        """As it is after a pause that ends by itself by then."""
        ends = subscription.resumes_at
        if ends is None or ends > self._until or subscription.handed_over_at is not None:
            return subscription
        shift = subscription.resumes_shifted
        return lifecycle.resumed(subscription, ends, shift=shift, owes=False).subscription

    def _why_nothing_follows(self, row: Row[Any], subscription: Subscription) -> Iterator[Expected]:
        """Yield the first period that would begin by then, with the reason why it does not."""
        number = max(subscription.next_period, subscription.first_number_from(self._now))
        start = subscription.start_of(number)
        if start > self._until:
            return
        reason = f"subscription is {subscription.status}"
        if subscription.handed_over_at is not None:
            reason = HANDED_OVER
        elif subscription.status is SubscriptionStatus.ENDED:
            reason = "all its periods have been billed"
        yield of_period(row, subscription, number, start, "lifecycle", reason)

    def _checked(self, row: Row[Any], expected: Expected) -> Expected:
        """Return the line with a reason if something stops every charge."""
        if expected.reason is not None:
            return expected
        reason = self._why_no_card(row, expected.at or self._now)
        if reason is None and not self._sales_on:
            reason = switches.SALES_OFF
        if reason is not None:
            return replace(expected, reason=reason)
        told = self._notices.after(row, expected)
        return replace(told, reason=LATER) if told.at and told.at > self._until else told

    def _why_no_card(self, row: Row[Any], at: datetime) -> str | None:
        if row.card_id is None:
            return NO_CARD
        card = self._doubtful.get(row.card_id)
        if card is None:
            return None
        paid_with = payer(card, lambda: self._owned.get(row.customer_id, ()), at)
        return paid_with if isinstance(paid_with, str) else None


def _is_held(row: Row[Any]) -> bool:
    return bool(row.held) and row.status in BILLABLE and row.handed_over_at is None


def _armed(row: Row[Any], subscription: Subscription) -> Subscription:
    """Return the subscription as it is after its activation."""
    if not _is_held(row):
        return subscription
    return replace(subscription, next_billing_at=subscription.start_of(subscription.next_period))


def _why_nobody_charges(item: DueInvoice, subscription: Subscription) -> str | None:
    """Return why it is not charged on any date, or None."""
    live = item.live
    if live is not None and live.status is AttemptStatus.SUBMITTED:
        return IN_FLIGHT
    asked_for = item.invoice.next_origin in ASKED_FOR
    suspended = subscription.status is SubscriptionStatus.SUSPENDED
    if subscription.status not in COLLECTABLE and not (asked_for and suspended):
        return f"subscription is {subscription.status}"
    return PAGE_OPEN if live is not None and live.origin is Origin.LINK else None
