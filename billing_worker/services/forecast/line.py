"""One line of a preview: a coming charge, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from billing_worker.domain.catch_up import Planned
from billing_worker.domain.invoice import Invoice, reference_for
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import Subscription
from billing_worker.persistence.claims import UnreadableInvoice

OPEN = "open"
"""The rule of a charge whose period is already open, unless the charge was missed."""

IN_FLIGHT = "in flight: the gateway is asked what became of it"
PAGE_OPEN = "a page for it is open: the customer decides"
LATER = "next attempt is later"
CANCELLED_BY_THEN = "cancelled by then"
UNPLANNED = "cannot be planned: "
UNREADABLE = "cannot be read: "

HELD_IMPORT = "held since its import"
HANDED_OVER = "handed over to another book"
CHARGED = "charged"
"""The result for a held import if all held imports are activated now."""

NO_CARD = "no card"


@dataclass(frozen=True, slots=True)
class Expected:
    """A coming charge, or the reason why there is none."""

    subscription: str
    customer: str
    invoice: str
    period: int
    start: datetime  # start of the period
    at: datetime | None  # when it is charged; None: not charged, or at an unknown time
    money: Money | None  # None: unreadable
    rule: str
    reason: str | None  # why it is not charged; None: it is charged
    if_armed: str | None = None  # for a held import: CHARGED, or why not after its activation

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


def needs_a_card(reason: str) -> bool:
    """Return whether only a usable card is missing."""
    return reason == NO_CARD or reason.startswith("card_")


def cannot_be_planned(row: Row[Any], money: Money | None, reason: str) -> Expected:
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


def cannot_be_read(row: Row[Any], invoice: UnreadableInvoice) -> Expected:
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


def of_open_invoice(
    row: Row[Any],
    invoice: Invoice,
    planned: Planned | None,
    reason: str | None,
    at: datetime | None = None,
) -> Expected:
    return Expected(
        subscription=row.reference_id,
        customer=row.customer_reference,
        invoice=invoice.reference_id,
        period=invoice.period_number,
        start=invoice.period_start,
        at=at,
        money=invoice.money,
        rule=planned.rule if planned else OPEN,
        reason=reason,
    )


def of_period(
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
        money=subscription.price_at(start),
        rule=rule,
        reason=reason,
    )


class Totals:
    """Collects counts and sums of lines."""

    def __init__(self) -> None:
        self._now = _Sums()
        self._if_armed = _Sums()

    def add(self, expected: Expected) -> None:
        self._now.add(expected.money, expected.reason)
        if expected.if_armed is not None:
            reason = None if expected.if_armed == CHARGED else expected.if_armed
            self._if_armed.add(expected.money, reason)

    def as_dict(self) -> dict[str, Any]:
        """Return {charged: [{currency, count, amount}], not_charged: {reason: count}}, and under
        `if_armed` the same for held imports, if there are any.
        """
        held = self._if_armed.as_dict()
        return self._now.as_dict() | ({"if_armed": held} if any(held.values()) else {})


class _Sums:
    def __init__(self) -> None:
        self._charged: dict[str, tuple[int, int]] = {}  # (count, minor units)
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
