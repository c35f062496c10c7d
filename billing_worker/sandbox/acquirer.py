"""The bank behind the gateway: it charges or declines as the card token's script says."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_DOWN, Decimal
from typing import Final

from billing_worker.sandbox.behaviour import Behaviour
from billing_worker.sandbox.card_outcomes import Ending
from billing_worker.sandbox.invoices import Invoice
from billing_worker.sandbox.ledger import Debit, Ledger

_CENT: Final = Decimal("0.01")

_Event = Callable[[Invoice, datetime], None]


@dataclass(frozen=True, slots=True, order=True)
class _Scheduled:
    due: datetime
    sequence: int  # Keeps simultaneous events in the order of scheduling.
    invoice: Invoice
    event: _Event


class Acquirer:
    """Charges, declines and expires invoices. Not thread-safe: the gateway calls it under a lock.

    Nothing runs in the background. Later events are scheduled, and `advance` carries out the due
    ones, each dated at the instant at which it was due.
    """

    def __init__(
        self, ledger: Ledger, behaviour: Behaviour, on_change: Callable[[Invoice], None]
    ) -> None:
        self.behaviour = behaviour
        self._ledger = ledger
        self._on_change = on_change
        self._schedule: list[_Scheduled] = []
        self._scheduled = 0

    def advance(self, now: datetime) -> None:
        while self._schedule and self._schedule[0].due <= now:
            scheduled = heapq.heappop(self._schedule)
            scheduled.event(scheduled.invoice, scheduled.due)

    def admit(self, invoice: Invoice, now: datetime) -> None:
        """Start the lifetime of a new invoice."""
        self._schedule_event(now, self.behaviour.lifetime_seconds, invoice, self._expire)
        self._on_change(invoice)

    def sell(self, invoice: Invoice, now: datetime) -> None:
        """Carry out one sale. A second sale has its effect again; the gateway has to refuse it."""
        ending = invoice.outcome.ending
        if ending is Ending.NOT_RECEIVED:
            return
        invoice.sales += 1
        later = self._later(invoice)
        match ending:
            case Ending.CHARGED:
                self.charge(invoice, now)
            case Ending.CHARGED_IN_PART:
                self._charge_half(invoice, now)
            case Ending.CHARGED_LATER:
                self._schedule_event(now, later, invoice, self.charge)
            case Ending.DECLINED:
                self._decline(invoice, now)
            case Ending.DECLINED_THEN_CHARGED:
                self._decline(invoice, now)
                self._schedule_event(now, later, invoice, self.charge)
            case Ending.UNDECIDED | Ending.CHARGED_AFTER_EXPIRY:
                self._wait(invoice, now)

    def charge(self, invoice: Invoice, now: datetime) -> None:
        self._debit(invoice, invoice.payment_amount, now)
        self._settle(invoice, "processed", "ok", now)

    def _charge_half(self, invoice: Invoice, now: datetime) -> None:
        self._debit(invoice, (invoice.payment_amount / 2).quantize(_CENT, ROUND_DOWN), now)
        self._settle(invoice, "partially_processed", "ok", now)

    def _debit(self, invoice: Invoice, amount: Decimal, now: datetime) -> None:
        # The worst case: a second debit of one invoice moves money but does not show on it.
        invoice.processed_amount = amount
        invoice.processed_at = now
        self._ledger.record(
            Debit(
                reference_id=invoice.order.reference_id,
                gateway_id=invoice.gateway_id,
                customer_reference_id=invoice.order.customer.reference_id,
                amount=amount,
                currency=invoice.currency,
                at=now,
                test_mode=invoice.test_mode,
            )
        )

    def _decline(self, invoice: Invoice, now: datetime) -> None:
        invoice.failed_at = now
        self._settle(invoice, "process_failed", invoice.outcome.resolution, now)

    def _wait(self, invoice: Invoice, now: datetime) -> None:
        if invoice.is_open and invoice.outcome.resolution != invoice.resolution:
            self._settle(invoice, invoice.status, invoice.outcome.resolution, now)

    def _expire(self, invoice: Invoice, now: datetime) -> None:
        if not invoice.is_open:
            return
        outcome = invoice.outcome
        self._settle(invoice, "expired", outcome.expires_with if invoice.sales else "ok", now)
        if outcome.ending is Ending.CHARGED_AFTER_EXPIRY and invoice.sales:
            self._schedule_event(now, self._later(invoice), invoice, self.charge)

    def _later(self, invoice: Invoice) -> float:
        own = invoice.outcome.later_seconds
        return self.behaviour.later_seconds if own is None else own

    def _settle(self, invoice: Invoice, status: str, resolution: str, now: datetime) -> None:
        invoice.status = status
        invoice.resolution = resolution
        invoice.updated_at = now
        self._on_change(invoice)

    def _schedule_event(
        self, now: datetime, seconds: float, invoice: Invoice, event: _Event
    ) -> None:
        due = now + timedelta(seconds=seconds)
        self._scheduled += 1
        heapq.heappush(self._schedule, _Scheduled(due, self._scheduled, invoice, event))
