"""Builds domain objects from rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up_policy import CatchUp, Policy
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.money import Money
from billing_worker.domain.statement import Owner
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.persistence.schema.tables import subscriptions


def attempt_from(row: Row[Any]) -> Attempt:
    return Attempt(
        id=row.id,
        invoice_id=row.invoice_id,
        number=row.number,
        reference_id=row.reference_id,
        status=AttemptStatus(row.status),
        origin=Origin(row.origin),
        card_id=row.card_id,
        money=Money.from_minor(row.amount_minor, row.currency),
        test_mode=row.test_mode,
        fence=row.fence,
        claims=row.claims,
        created_at=row.created_at,
        lease_until=row.lease_until,
        gateway_id=row.gateway_id,
        submitted_at=row.submitted_at,
        settled_at=row.settled_at,
        next_poll_at=row.next_poll_at,
        rechecks=row.rechecks,
        unpaid_since=row.unpaid_since,
        sale_status=row.sale_status,
        sale_resolution=row.sale_resolution,
        outcome=row.outcome,
        original_code=row.original_code,
        undecided_since=row.undecided_since,
        heard_at=row.heard_at,
        resolved_at=row.resolved_at,
        resolved_over=row.resolved_over,
    )


def invoice_from(row: Row[Any]) -> Invoice:
    return Invoice(
        id=row.id,
        reference_id=row.reference_id,
        subscription_id=row.subscription_id,
        period_number=row.period_number,
        period_start=row.period_start,
        period_end=row.period_end,
        money=Money.from_minor(row.amount_minor, row.currency),
        status=InvoiceStatus(row.status),
        reason=row.reason,
        next_attempt_at=row.next_attempt_at,
        enqueue_at=row.enqueue_at,
        not_charged_count=row.not_charged_count,
        created_at=row.created_at,
        paid_at=row.paid_at,
        paused_attempt_at=row.paused_attempt_at,
        next_origin=Origin(row.next_origin),
        first_declined_at=row.first_declined_at,
        give_up_at=row.give_up_at,
    )


def owner_from(row: Row[Any]) -> Owner:
    """Return the owner of a subscription's invoices at the gateway.

    `row` has the subscription's columns, `customer_reference`, and `identity.IDENTITY` and `PREFIX`.
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


def subscription_from(row: Row[Any]) -> Subscription:
    return Subscription(
        id=row.id,
        reference_id=row.reference_id,
        customer_id=row.customer_id,
        card_id=row.card_id,
        status=SubscriptionStatus(row.status),
        money=Money.from_minor(row.amount_minor, row.currency),
        schedule=Schedule(row.anchor_at, Unit(row.interval), row.interval_count, row.timezone),
        ends_after_periods=row.ends_after_periods,
        next_period=row.next_period,
        next_billing_at=row.next_billing_at,
        description=row.description,
        series_start=row.series_start,
        paused_at=row.paused_at,
        paused_from=SubscriptionStatus(row.paused_from) if row.paused_from else None,
        cancels_at=row.cancels_at,
        catch_up=Policy(CatchUp(row.catch_up), row.catch_up_days),
        dunning_policy=row.dunning_policy,
        ends_at=row.ends_at,
        handed_over_at=row.handed_over_at,
    )
