"""Rows into the domain's values."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up_policy import CatchUp, Policy
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import Subscription, SubscriptionStatus


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
        look_at=row.look_at,
        rechecks=row.rechecks,
        unpaid_since=row.unpaid_since,
        sale_status=row.sale_status,
        sale_resolution=row.sale_resolution,
        outcome=row.outcome,
        original_code=row.original_code,
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
        ring_at=row.ring_at,
        not_charged_count=row.not_charged_count,
        created_at=row.created_at,
        paid_at=row.paid_at,
        paused_attempt_at=row.paused_attempt_at,
        next_origin=Origin(row.next_origin),
        first_declined_at=row.first_declined_at,
        give_up_at=row.give_up_at,
    )


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
    )
