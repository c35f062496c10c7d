"""Attempts, invoices and subscriptions in their rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import Row

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up_policy import CatchUp, Policy
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.money import Money
from billing_worker.domain.outgoing.notice import NoticePolicy
from billing_worker.domain.statement import Owner
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.persistence.schema.mapping import Objects, Part
from billing_worker.persistence.schema.tables import subscriptions

MONEY = Part(("amount_minor", "currency"), Money.from_minor, attrgetter("minor", "currency"))

ATTEMPTS = Objects(
    Attempt,
    status=Part(("status",), AttemptStatus),
    origin=Part(("origin",), Origin),
    money=MONEY,
)
INVOICES = Objects(
    Invoice,
    status=Part(("status",), InvoiceStatus),
    next_origin=Part(("next_origin",), Origin),
    money=MONEY,
)
SUBSCRIPTIONS = Objects(
    Subscription,
    status=Part(("status",), SubscriptionStatus),
    paused_from=Part(("paused_from",), lambda status: status and SubscriptionStatus(status)),
    money=MONEY,
    schedule=Part(
        ("anchor_at", "interval", "interval_count", "timezone", "billing_day"),
        lambda anchor, unit, count, tz, day: Schedule(anchor, Unit(unit), count, tz, day),
        attrgetter("anchor", "unit", "count", "tz", "day"),
    ),
    notices=Part(
        ("notices",),
        lambda policy: NoticePolicy.parse(policy) if policy else None,
        lambda policy: (str(policy) if policy else None,),
    ),
    catch_up=Part(
        ("catch_up", "catch_up_days"),
        lambda rule, days: Policy(CatchUp(rule), days),
        attrgetter("rule", "days"),
    ),
)

attempt_from = ATTEMPTS.read
invoice_from = INVOICES.read
subscription_from = SUBSCRIPTIONS.read


def owner_from(row: Row[Any]) -> Owner:
    """Return the owner of a subscription's invoices at the gateway.

    `row` has the subscription's columns, `customer_reference`, and `identity.IDENTITY` and `BOOK_PREFIX`.
    """
    prefix = row.book_prefix if row.from_prefix is None else row.from_prefix
    was_elsewhere = row.taken_back_at is not None and prefix != ""
    return Owner(row.book, row.customer_reference, row.from_book, was_elsewhere)


LONGEST_TROUBLE = 500

TERMS: list[Any] = [column for column in subscriptions.c if column.name != "metadata"]
"""The columns of a subscription's terms.

Without the caller's own data, which can be large and does not affect charges.
"""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A subscription that this version cannot read. It must not stop the others."""

    id: int
    reference_id: str
    customer_id: int
    next_period: int
    next_billing_at: datetime | None
    trouble: str | None  # the reason that was already told
    reason: str


def readable(rows: Iterable[Row[Any]]) -> tuple[list[Subscription], list[Unreadable]]:
    """Return the subscriptions of the rows, in order, and the rows that could not be read."""
    read: list[Subscription] = []
    unreadable: list[Unreadable] = []
    for row in rows:
        try:
            read.append(subscription_from(row))
        except Exception as error:  # noqa: BLE001 - reported by the caller, one row at a time
            unreadable.append(
                Unreadable(
                    row.id, row.reference_id, row.customer_id, row.next_period,
                    row.next_billing_at, row.trouble, trouble_of(error),
                )
            )  # fmt: skip
    return read, unreadable


def trouble_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_TROUBLE]
