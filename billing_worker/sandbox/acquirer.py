"""The bank behind the gateway: moves the money when and how the card's script says."""

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
class _Appointment:
    due: datetime
    sequence: int  # Keeps simultaneous events in the order in which they were arranged.
    invoice: Invoice
    event: _Event


class Acquirer:
    """Not thread-safe: the gateway calls it under its own lock.

    Nothing runs in the background. What time brings is written in a diary, and `advance` makes it
    happen at the instant it was due, however late anybody looks.
    """

    def __init__(
        self, ledger: Ledger, behaviour: Behaviour, on_change: Callable[[Invoice], None]
    ) -> None:
        self.behaviour = behaviour
        self._ledger = ledger
        self._on_change = on_change
        self._diary: list[_Appointment] = []
        self._arranged = 0

    def advance(self, now: datetime) -> None:
        while self._diary and self._diary[0].due <= now:
            appointment = heapq.heappop(self._diary)
            appointment.event(appointment.invoice, appointment.due)

    def admit(self, invoice: Invoice, now: datetime) -> None:
        """Start the lifetime of a new invoice."""
        self._arrange(now, self.behaviour.lifetime_seconds, invoice, self._expire)
        self._on_change(invoice)

    def sell(self, invoice: Invoice, now: datetime) -> None:
        """Take up one sale. Selling twice has its effect twice: refusing is up to the gateway."""
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
                self._arrange(now, later, invoice, self.charge)
            case Ending.DECLINED:
                self._decline(invoice, now)
            case Ending.DECLINED_THEN_CHARGED:
                self._decline(invoice, now)
                self._arrange(now, later, invoice, self.charge)
            case Ending.UNDECIDED | Ending.CHARGED_AFTER_EXPIRY:
                self._wait(invoice, now)

    def charge(self, invoice: Invoice, now: datetime) -> None:
        self._debit(invoice, invoice.payment_amount, now)
        self._settle(invoice, "processed", "ok", now)

    def _charge_half(self, invoice: Invoice, now: datetime) -> None:
        self._debit(invoice, (invoice.payment_amount / 2).quantize(_CENT, ROUND_DOWN), now)
        self._settle(invoice, "partially_processed", "ok", now)

    def _debit(self, invoice: Invoice, amount: Decimal, now: datetime) -> None:
        # A second debit of one invoice moves money but shows nowhere on it: the worst case.
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
            self._arrange(now, self._later(invoice), invoice, self.charge)

    def _later(self, invoice: Invoice) -> float:
        own = invoice.outcome.later_seconds
        return self.behaviour.later_seconds if own is None else own

    def _settle(self, invoice: Invoice, status: str, resolution: str, now: datetime) -> None:
        invoice.status = status
        invoice.resolution = resolution
        invoice.updated_at = now
        self._on_change(invoice)

    def _arrange(self, now: datetime, seconds: float, invoice: Invoice, event: _Event) -> None:
        due = now + timedelta(seconds=seconds)
        self._arranged += 1
        heapq.heappush(self._diary, _Appointment(due, self._arranged, invoice, event))
