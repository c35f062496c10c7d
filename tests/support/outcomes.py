"""Attempts, invoices and statements for tests of what follows from a piece of news."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.card import Card
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import (
    Case,
    Context,
    Stated,
    conclude,
)
from billing_worker.domain.statement import (
    Statement,
)
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.domain.timings import Timings

NOW = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
PRICE = Money.parse("9.99", "USD")
TERMS = Timings()


def attempt(status=AttemptStatus.SUBMITTED, **changes):
    made = Attempt(
        id=1, invoice_id=1, number=1, reference_id="sub-1-p0-a1", status=status,
        origin=Origin.SCHEDULED, card_id=1, money=PRICE, test_mode=True, fence=1, claims=1,
        created_at=NOW, lease_until=None, gateway_id="cpi_1", submitted_at=NOW, settled_at=None,
        next_poll_at=NOW, rechecks=0, unpaid_since=None, sale_status=None, sale_resolution=None,
        outcome=None,
    )  # fmt: skip
    return replace(made, **changes)


def invoice(status=InvoiceStatus.OPEN, **changes):
    made = Invoice(
        id=1, reference_id="sub-1-p0", subscription_id=1, period_number=0, period_start=NOW,
        period_end=NOW + timedelta(days=31), money=PRICE, status=status, reason=None,
        next_attempt_at=None, enqueue_at=None, not_charged_count=0, created_at=NOW, paid_at=None,
    )  # fmt: skip
    return replace(made, **changes)


def subscription(status=SubscriptionStatus.ACTIVE):
    return Subscription(
        id=1, reference_id="sub-1", customer_id=1, card_id=1, status=status, money=PRICE,
        schedule=Schedule(NOW, Unit.MONTH, 1, "UTC"), ends_after_periods=None, next_period=1,
        next_billing_at=NOW + timedelta(days=31),
    )  # fmt: skip


def case(status=AttemptStatus.SUBMITTED, **changes):
    return Case(attempt(status, **changes), invoice(), subscription())


def stated(status, resolution="ok", **changes):
    statement = Statement(
        gateway_id="cpi_1", status=status, resolution=resolution, reference_id="sub-1-p0-a1",
        amount=Decimal("9.99"), payment_amount=Decimal("9.99"), processed_amount=None,
        currency="USD", test_mode=True,
    )  # fmt: skip
    return Stated(replace(statement, **changes))


def told(news, before=None, now=NOW):
    return conclude(before or case(), news, Context(now, "test", TERMS))


def after_the_grace(status, before):
    waiting = told(stated(status), before).case
    return told(stated(status), waiting, NOW + TERMS.expiry_grace)


def kinds(concluded):
    return [str(event.kind) for event in concluded.events]


def card(card_id=1, **changes):
    made = Card(card_id, f"print-{card_id}", "visa", 12, 2032, None, None)
    return replace(made, **changes)
