"""The books of real processes held against the gateway's own ledger, after a storm."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sqlalchemy import and_, not_, select

from billing_worker.domain import attempt as attempt_rules
from billing_worker.domain.attempt import AttemptStatus
from billing_worker.domain.errors import IllegalTransition
from billing_worker.persistence.book import identity
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store

PAID = frozenset({"paid"})
NOT_CHARGED = frozenset({"dated", "person"})
"""Tried again, or after some failures in a row put before a person."""

FATES: Mapping[str, frozenset[str]] = {
    "approved": PAID,
    "approved_later": PAID,
    "slow": PAID,
    "answer_lost_after": PAID,
    "never_answers_after": PAID,
    "error_500_after": PAID,
    "html_502_after": PAID,
    "create_answer_lost": PAID,
    "create_error_500": PAID,
    "flips_to_processed": PAID,
    "answer_lost_before": NOT_CHARGED,
    "error_500_before": NOT_CHARGED,
    "never_answers_before": NOT_CHARGED,
    "pending_forever": NOT_CHARGED,
    "needs_3ds": NOT_CHARGED,
    "decline_insufficient_funds": NOT_CHARGED,
    "decline_card_expired": NOT_CHARGED,
    "rejects_token": frozenset({"person"}),
    "partially_processed": frozenset({"unknown"}),
}
"""What becomes of a card token's invoice in the calm after the storm. Tokens with which the gateway
itself charges twice (`late_after_expiry`) are not dealt."""

LATE_MONEY = frozenset({"flips_to_processed"})
"""The gateway calls the charge failed, and takes the money afterwards."""

BY_THE_WEATHER = frozenset(
    {
        "keeps_crashing", "not_charged_repeatedly", "not_charged", "expired_unproven",
        "expired_unproven_again", "late_money_may_come",
    }
)  # fmt: skip
"""Why an invoice that could have been paid is dated, or waits for a person: its workers died too
often, or came too late for the gateway's invoice. The test sees to it that these are few."""

ANOTHER_BOOKS = "belongs to another book"
"""Why an invoice waits for a person where two books have equal references: in doubt about a charge
it found the other's."""

_MOVES = {f"attempt.{status}": status for status in AttemptStatus}
_MOVES["attempt.forbidden"] = AttemptStatus.NOT_CHARGED  # by a rule, before anything was sold
_IS = tables.attempts.c.status
KEPT_UNKNOWN = and_(_IS == "submitted", tables.attempts.c.outcome.is_not(None))
"""With the evidence why: half of an amount was taken. It is asked about for ever."""

UNRESOLVED = and_(_IS.in_(("prepared", "submitted")), not_(KEPT_UNKNOWN))


@dataclass
class Reckoning:
    invoices: Sequence[Any]
    attempts: Sequence[Any]
    events: Sequence[Any]
    violations: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)  # invoices to be explained
    fates: Counter[str] = field(default_factory=Counter)
    debits: int = 0
    sales: int = 0
    charged_twice: int = 0
    lost: int = 0
    takeovers: int = 0
    prefix: str = ""  # of the book's references at the gateway

    @classmethod
    def read(cls, store: Store) -> Reckoning:
        with store.reading() as connection:
            invoices, attempts, events = (
                connection.execute(select(table).order_by(table.c.id)).all()
                for table in (tables.invoices, tables.attempts, tables.events)
            )
            prefix = identity.read(connection).prefix
        return cls(invoices, attempts, events, prefix=prefix)

    def _invoice(self, reference: str) -> str:
        """The invoice of a reference at the gateway; an invoice's own stays as it is."""
        bare = reference.removeprefix(self.prefix)
        return bare.rpartition("-a")[0] or bare

    def _outcome(self, tokens: Mapping[str, str], reference: str) -> str:
        return tokens[self._invoice(reference)].partition(".")[0]

    @cached_property
    def _references(self) -> dict[int, str]:
        return {attempt.id: attempt.reference_id for attempt in self.attempts}

    def compare(
        self,
        tokens: Mapping[str, str],
        debits: Sequence[Any],
        requests: Any,
        *,
        shared: bool = False,
    ) -> None:
        """`tokens` by invoice reference; `debits` of this book, and the sandbox's own page
        `requests`. `shared`: another book with the same references is on the account, so that a
        reference may be sold by each.
        """
        self.debits = len(debits)
        self.sales = requests["operations"]["sale"]
        self.takeovers = sum(attempt.fence > 1 for attempt in self.attempts)
        self._find(self._charged_once(debits))
        self._find(self._debits_explained(debits, tokens))
        self._find(self._nothing_lost(tokens))
        if not shared:
            self._find(self._sold_once(requests["references"]))
        self._find(self._nothing_unresolved())
        self._find(self._replayed())
        self._find(self._one_at_a_time())
        self._find(self._opened_and_paid_once())
        self._find(self._never_called_unpaid(debits, tokens))

    def _find(self, found: Iterator[tuple[str, str]]) -> None:
        for reference, what in found:
            self.suspects.add(self._invoice(reference))
            self.violations.append(f"{reference}: {what}")

    def _charged_once(self, debits: Sequence[Any]) -> Iterator[tuple[str, str]]:
        per_invoice = Counter(self._invoice(debit["reference_id"]) for debit in debits)
        for reference, count in per_invoice.items():
            if count > 1:
                self.charged_twice += 1
                yield reference, f"CHARGED {count} TIMES"

    def _debits_explained(
        self, debits: Sequence[Any], tokens: Mapping[str, str]
    ) -> Iterator[tuple[str, str]]:
        attempts = {attempt.reference_id: attempt for attempt in self.attempts}
        moved = Counter(debit["reference_id"] for debit in debits)
        for debit in debits:
            reference = debit["reference_id"]
            attempt = attempts.get(reference)
            if attempt is None:
                yield reference, "moved money and is not in our books"
                continue
            half = self._outcome(tokens, reference) == "partially_processed"
            if attempt.status != ("submitted" if half else "succeeded"):
                yield reference, f"moved money and is {attempt.status}"
            if attempt.gateway_id != debit["gateway_id"]:
                yield reference, f"moved money on {debit['gateway_id']}, not {attempt.gateway_id}"
            if not half and str(debit["amount"]) != "9.99":
                yield reference, f"moved {debit['amount']}"
        for reference, attempt in attempts.items():
            if attempt.status in {"succeeded", "surplus"} and moved[reference] != 1:
                yield reference, f"is {attempt.status} and moved money {moved[reference]} times"

    def _nothing_lost(self, tokens: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        known = {invoice.reference_id: invoice for invoice in self.invoices}
        attempts = defaultdict(list)
        for attempt in self.attempts:
            attempts[attempt.invoice_id].append(attempt)
        for reference in tokens:
            if reference not in known:
                self.lost += 1
                yield reference, "LOST: its period was never opened"
        for reference, invoice in known.items():
            fate = _fate(invoice, attempts[invoice.id])
            why = (invoice.reason or "").partition(":")[0]
            if fate in FATES[self._outcome(tokens, reference)]:
                self.fates[fate] += 1
            elif fate == "person" and ANOTHER_BOOKS in (invoice.reason or ""):
                self.fates[f"{fate}: {ANOTHER_BOOKS}"] += 1
            elif fate in NOT_CHARGED and why in BY_THE_WEATHER:
                self.fates[f"{fate} by the weather ({why})"] += 1
            else:
                self.fates[fate] += 1
                self.lost += 1
                yield reference, f"LOST: {tokens[reference]} has the fate {fate}: {invoice.reason}"

    def _sold_once(self, requests: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for attempt in self.attempts:
            sales = requests.get(attempt.reference_id, {}).get("sale", 0)
            if sales > 1:
                yield attempt.reference_id, f"was sold {sales} times"
            if sales and attempt.submitted_at is None:
                yield attempt.reference_id, "was sold and never submitted"

    def _nothing_unresolved(self) -> Iterator[tuple[str, str]]:
        for attempt in self.attempts:
            if attempt.status == "prepared" or _is_silent(attempt):
                yield attempt.reference_id, f"is still {attempt.status}"
            if attempt.status == "submitted" and attempt.next_poll_at is None:
                yield attempt.reference_id, "is unknown, and nobody asks about it"

    def _replayed(self) -> Iterator[tuple[str, str]]:
        """The history, walked through the table of transitions, ends where the row stands."""
        states: dict[int, AttemptStatus] = {}
        for event in self.events:
            to = _MOVES.get(event.kind)
            if to is None:
                continue
            before = states.get(event.attempt_id)
            states[event.attempt_id] = to
            try:
                if before is not None:
                    attempt_rules.move(before, to)
            except IllegalTransition as error:
                yield self._references[event.attempt_id], f"history: {error}"
        for attempt in self.attempts:
            said = states.get(attempt.id)
            if said != attempt.status:
                yield attempt.reference_id, f"is {attempt.status}, its events say {said}"

    def _one_at_a_time(self) -> Iterator[tuple[str, str]]:
        flying: defaultdict[int, set[int]] = defaultdict(set)
        for event in self.events:
            if event.kind == "attempt.submitted":
                flying[event.invoice_id].add(event.attempt_id)
                if len(flying[event.invoice_id]) > 1:
                    yield self._references[event.attempt_id], "submitted beside another attempt"
            elif event.kind in _MOVES:
                flying[event.invoice_id].discard(event.attempt_id)

    def _opened_and_paid_once(self) -> Iterator[tuple[str, str]]:
        kinds = Counter((event.invoice_id, event.kind) for event in self.events)
        for invoice in self.invoices:
            opened, paid = (kinds[invoice.id, f"invoice.{what}"] for what in ("opened", "paid"))
            if opened != 1:
                yield invoice.reference_id, f"was opened {opened} times"
            if paid != (invoice.status == "paid"):
                yield invoice.reference_id, f"is {invoice.status}, and was paid {paid} times"

    def _never_called_unpaid(
        self, debits: Sequence[Any], tokens: Mapping[str, str]
    ) -> Iterator[tuple[str, str]]:
        """Unknown never becomes failed. Without times: some of the clocks were wrong."""
        charged = {debit["reference_id"] for debit in debits}
        for event in self.events:
            if event.kind not in {"attempt.declined", "attempt.not_charged"}:
                continue
            reference = self._references[event.attempt_id]
            if reference in charged and self._outcome(tokens, reference) not in LATE_MONEY:
                yield reference, f"{event.kind} was written, and it was charged"

    @property
    def unpaid_by_the_weather(self) -> int:
        return sum(count for fate, count in self.fates.items() if "by the weather" in fate)

    @property
    def stopped_by_another_book(self) -> int:
        return sum(count for fate, count in self.fates.items() if fate.endswith(ANOTHER_BOOKS))

    def figures(self) -> str:
        fates = ", ".join(f"{count} {fate}" for fate, count in sorted(self.fates.items()))
        return (
            f"{self.sales} sales, {self.debits} debits, {self.takeovers} attempts taken over; "
            f"{fates}; charged twice: {self.charged_twice}, lost: {self.lost}"
        )


def _is_silent(attempt: Any) -> bool:
    return attempt.status == "submitted" and attempt.outcome is None


def _fate(invoice: Any, attempts: Sequence[Any]) -> str:
    """Exactly one of the fates that a period may have; anything else is spelled out."""
    live = [attempt for attempt in attempts if attempt.status in {"prepared", "submitted"}]
    unknown = any(attempt.status == "submitted" and attempt.submitted_at for attempt in live)
    is_open = invoice.status == "open"
    facts = {
        "paid": invoice.status == "paid",
        "waived": invoice.status in {"void", "uncollectible"} and invoice.reason is not None,
        "unknown": is_open and unknown,
        "dated": is_open and invoice.next_attempt_at is not None and invoice.enqueue_at is not None,
        "person": is_open
        and invoice.next_attempt_at is None
        and invoice.reason is not None
        and not live,
    }
    held = [name for name, holds in facts.items() if holds]
    return held[0] if len(held) == 1 else f"{' and '.join(held) or 'none'} at once"
