"""Who stood beside the gateway: what it said of a period's other invoices when it was asked for
money, and therefore what no client could have known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from billing_worker.sandbox.gateway import SandboxGateway
from billing_worker.sandbox.invoices import Invoice

CALLED_FAILED = "declined by the gateway, and charged after that"
CALLED_EXPIRED = "expired for as long as it is waited, and charged after that"
ASKED_FOR = "expired and its grace over, somebody asked for another try, and charged after that"


@dataclass(frozen=True, slots=True)
class Seen:
    """An invoice of the same period for which money had been asked before."""

    gateway_id: str
    status: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Ask:
    book: str | None
    gateway_id: str
    reference_id: str
    at: datetime
    before: tuple[Seen, ...]

    @property
    def period(self) -> str:
        return period_of(self.reference_id)


@dataclass(frozen=True, slots=True)
class Waits:
    """What the worker promises to wait after the gateway's `expired`."""

    automatic: timedelta
    asked_for: timedelta


class Witness:
    def __init__(self, sandbox: SandboxGateway) -> None:
        self._sandbox = sandbox
        self.asks: list[Ask] = []
        self._asked: defaultdict[tuple[str | None, str], list[Invoice]] = defaultdict(list)
        acquirer = sandbox._books.acquirer
        sell = acquirer.sell

        def seen_to_sell(invoice: Invoice, now: datetime) -> None:
            self.asked(invoice, now)
            sell(invoice, now)

        acquirer.sell = seen_to_sell  # type: ignore[method-assign]

    def asked(self, invoice: Invoice, now: datetime) -> None:
        reference, book = invoice.order.reference_id, invoice.order.metadata.get("book")
        asked = self._asked[book, period_of(reference)]
        before = tuple(
            Seen(other.gateway_id, other.status, other.updated_at)
            for other in asked
            if other is not invoice
        )
        self.asks.append(Ask(book, invoice.gateway_id, reference, now, before))
        if invoice not in asked:
            asked.append(invoice)

    def asked_by_id(self, gateway_id: str, now: datetime) -> None:
        """A customer pays on the gateway's page: refused, unless it is still open."""
        invoice = self._sandbox._books.with_id(gateway_id)
        if invoice is not None and invoice.is_open:
            self.asked(invoice, now)

    def second_debits(
        self, book: str, waits: Waits, asked_for: frozenset[str]
    ) -> Iterator[tuple[str, str, str | None]]:
        """(period, what happened, why no client could know it, or None where it could).

        `asked_for`: references of attempts that a person or the customer has asked for.
        """
        debited = {debit.gateway_id for debit in self._sandbox.ledger}
        for ask in self.asks:
            if ask.gateway_id not in debited or ask.book != book:
                continue
            wait = waits.asked_for if ask.reference_id in asked_for else waits.automatic
            for seen in ask.before:
                if seen.gateway_id in debited:
                    told = f"{ask.reference_id} sold beside one that was {seen.status}"
                    yield ask.period, told, _unknowable(seen, ask, wait, waits.automatic)


def _unknowable(seen: Seen, ask: Ask, wait: timedelta, automatic: timedelta) -> str | None:
    age = ask.at - seen.since
    if seen.status == "process_failed":
        return CALLED_FAILED
    if seen.status != "expired" or age < wait:
        return None
    return CALLED_EXPIRED if age >= automatic else ASKED_FOR


def period_of(reference_id: str) -> str:
    """sub-1-p0-a2 -> sub-1-p0"""
    return reference_id.rpartition("-a")[0] or reference_id
