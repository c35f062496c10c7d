"""Who stood beside the gateway: what it said of a period's other invoices when it was asked for
money, and therefore what no client could have known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from weakref import WeakKeyDictionary

from billing_worker.sandbox.gateway import SandboxGateway
from billing_worker.sandbox.invoices import Invoice

CALLED_FAILED = "declined by the gateway for as long as it is waited, and charged after that"
CALLED_EXPIRED = "expired for as long as it is waited, and charged after that"
ASKED_FOR = "a page expired, somebody asked for another try, and the page was charged after that"
PAID_ON_A_PAGE = "declined by the gateway, the customer paid on a page, and charged after that"
CALLED_UNPAID = (
    "unpaid as a named person said, somebody asked for another try, and charged after that"
)
AT_THE_SAME_TIME = "final and unpaid when it was last asked about, and charged within that minute"

LAST_QUESTION = timedelta(seconds=60)
"""The oldest that the answer to the last question may be when the sale is sent."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An invoice of the same period for which money had been asked before."""

    gateway_id: str
    status: str
    since: datetime
    on_page: bool
    was_final: bool  # before this status


@dataclass(frozen=True, slots=True)
class Ask:
    book: str | None
    gateway_id: str
    reference_id: str
    at: datetime
    on_page: bool
    before: tuple[Seen, ...]

    @property
    def period(self) -> str:
        return period_of(self.reference_id)


@dataclass(frozen=True, slots=True)
class Waits:
    """What the worker promises to wait after the gateway's `expired`, or its decline."""

    expired: timedelta
    declined: timedelta


class Witness:
    def __init__(self, sandbox: SandboxGateway) -> None:
        self._sandbox = sandbox
        self.asks: list[Ask] = []
        self._called_unpaid: dict[str, datetime] = {}
        self._asked_for: set[str] = set()
        _WITNESSES[sandbox] = self
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
        before = tuple(self._seen(other) for other in asked if other is not invoice)
        on_page = not invoice.order.instant
        self.asks.append(Ask(book, invoice.gateway_id, reference, now, on_page, before))
        if invoice not in asked:
            asked.append(invoice)

    def _seen(self, invoice: Invoice) -> Seen:
        lifetime = timedelta(seconds=self._sandbox.behaviour.lifetime_seconds)
        was_final = invoice.failed_at or invoice.created_at + lifetime < invoice.updated_at
        on_page = not invoice.order.instant
        return Seen(
            invoice.gateway_id, invoice.status, invoice.updated_at, on_page, bool(was_final)
        )

    def called_unpaid(self, gateway_id: str, now: datetime) -> None:
        """A named person says of what the gateway leaves undecided that it was not paid."""
        self._called_unpaid.setdefault(gateway_id, now)

    def people_asked_for(self, references: frozenset[str]) -> None:
        """A person or the customer has asked for these attempts, as the books of now say. It stays
        true when the books forget it.
        """
        self._asked_for |= {ask.gateway_id for ask in self.asks if ask.reference_id in references}

    def asked_by_id(self, gateway_id: str, now: datetime) -> None:
        """A customer pays on the gateway's page: refused, unless it is still open."""
        invoice = self._sandbox._books.with_id(gateway_id)
        if invoice is not None and invoice.is_open:
            self.asked(invoice, now)

    def second_debits(self, book: str, waits: Waits) -> Iterator[tuple[str, str, str | None]]:
        """(period, what happened, why no client could know it, or None where it could)."""
        debited = {debit.gateway_id for debit in self._sandbox.ledger}
        for ask in self.asks:
            if ask.gateway_id not in debited or ask.book != book:
                continue
            for seen in ask.before:
                if seen.gateway_id in debited:
                    told = f"{ask.reference_id} sold beside one that was {seen.status}"
                    is_asked_for = ask.gateway_id in self._asked_for
                    reason = _unknowable(seen, ask, waits, asked_for=is_asked_for)
                    if reason is None and is_asked_for and self._is_called_unpaid(seen, ask):
                        reason = CALLED_UNPAID
                    yield ask.period, told, reason

    def _is_called_unpaid(self, seen: Seen, ask: Ask) -> bool:
        """The word outlives no "paid" of the gateway, which is asked right before."""
        since = self._called_unpaid.get(seen.gateway_id)
        return since is not None and since <= ask.at and seen.status != "processed"


_WITNESSES: WeakKeyDictionary[SandboxGateway, Witness] = WeakKeyDictionary()


def people_call_unpaid(sandbox: SandboxGateway, gateway_id: str, now: datetime) -> None:
    """Tell the gateway's witness, if it has one, what people believe of an invoice."""
    witness = _WITNESSES.get(sandbox)
    if witness is not None:
        witness.called_unpaid(gateway_id, now)


def _unknowable(seen: Seen, ask: Ask, waits: Waits, *, asked_for: bool) -> str | None:
    age = ask.at - seen.since
    match seen.status:
        case "process_failed" if age >= waits.declined:
            return CALLED_FAILED
        case "process_failed" if ask.on_page or seen.on_page:
            return PAID_ON_A_PAGE
        case "expired" if age >= waits.expired:
            return CALLED_EXPIRED
        case "expired" if seen.on_page and asked_for:
            return ASKED_FOR
        case "processed" if seen.was_final and age <= LAST_QUESTION:
            return AT_THE_SAME_TIME
    return None


def period_of(reference_id: str) -> str:
    """sub-1-p0-a2 -> sub-1-p0"""
    return reference_id.rpartition("-a")[0] or reference_id
