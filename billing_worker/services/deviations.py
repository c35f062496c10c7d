"""A preview held against the books: what happened as planned, and why the rest did not.

Each deviation is explained by something on record: the invoice's own reason, the gateway's word,
or an event after the preview with who, when and why. What nothing explains is a bug or a break-in,
and somebody has to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain.catch_up import LATE_AFTER
from billing_worker.domain.events import EventKind
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import ONE_OFF
from billing_worker.persistence import outlook
from billing_worker.persistence.store import Store
from billing_worker.services.preview import needs_a_card

_K = EventKind
STOPS = frozenset(
    {
        _K.SUBSCRIPTION_MOVED,
        _K.SUBSCRIPTION_PAUSED,
        _K.SUBSCRIPTION_CANCELLED,
        _K.SUBSCRIPTION_ENDED,
        _K.SALES_SWITCHED,
        _K.CATCH_UP_HELD,
    }
)
STARTS = frozenset(
    {
        _K.SUBSCRIPTION_MOVED,
        _K.SUBSCRIPTION_RESUMED,
        _K.CANCELLATION_WITHDRAWN,
        _K.CATCH_UP_DECIDED,
        _K.SALES_SWITCHED,
        _K.SUBSCRIPTION_ARMED,
    }
)
CARDS = frozenset({_K.CARD_ADDED, _K.CARD_STORED})
"""They start nothing but what only a card kept from being charged."""

MOVES = frozenset({_K.SUBSCRIPTION_RESUMED, _K.SUBSCRIPTION_CHANGED})
CHANGES = frozenset({_K.SUBSCRIPTION_CHANGED})
"""What each kind of deviation may come from: a new description explains no missing charge."""

NOT_DECIDED_HERE = frozenset({"scheduled", "dunning"})
"""Origins of attempts that nobody asked for by name."""


@dataclass(frozen=True, slots=True)
class Deviation:
    invoice: str
    kind: str
    planned: str
    happened: str
    because: str | None  # None: unexplained

    def as_dict(self) -> dict[str, Any]:
        return {
            "invoice": self.invoice,
            "kind": self.kind,
            "planned": self.planned,
            "happened": self.happened,
            "because": self.because,
        }


@dataclass(slots=True)
class Comparison:
    """Counts while the deviations pass by: `counts` of as_planned, not_due_yet and the kinds."""

    counts: Counter[str] = field(default_factory=Counter)
    unexplained: int = 0

    def add(self, deviation: Deviation) -> None:
        self.counts[deviation.kind] += 1
        self.unexplained += deviation.because is None


def compare(
    store: Store,
    now: datetime,
    made_at: datetime,
    until: datetime,
    lines: Iterable[Mapping[str, Any]],
    comparison: Comparison,
) -> Iterator[Deviation]:
    """Deviations of the books from a saved preview (`Expected.as_dict` lines), as they are found.

    Counts land in `comparison`. Memory grows with the references of the preview, nothing else.
    """
    known: set[str] = set()
    rest = iter(lines)
    while batch := list(islice(rest, outlook.IN)):
        known.update(line["invoice"] for line in batch)
        with store.reading() as connection:
            found = list(_of_batch(connection, batch, now, made_at, comparison))
        yield from _counted(found, comparison)
    with store.reading() as connection:
        for page in outlook.paid_between(connection, made_at, min(now, until)):
            unforeseen = [row for row in page if row.reference_id not in known]
            yield from _counted(_unforeseen(connection, unforeseen, made_at), comparison)


def _counted(found: Iterable[Deviation], comparison: Comparison) -> Iterator[Deviation]:
    for deviation in found:
        comparison.add(deviation)
        yield deviation


# --- what was planned ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fact:
    """A planned line, with what the books say about it now."""

    line: Mapping[str, Any]
    invoice: Row[Any] | None
    events: Sequence[Row[Any]]  # since the preview, of the subscription and of no subscription
    now: datetime

    @property
    def planned(self) -> str:
        line = self.line
        if not line["charged"]:
            return f"no charge: {line['reason']}"
        return f"{line['amount']} {line['currency']} at {line['at']}"

    def deviation(self, kind: str, happened: str, because: str | None) -> Deviation:
        return Deviation(self.line["invoice"], kind, self.planned, happened, because)

    def decision(self, kinds: AbstractSet[EventKind], term: str | None = None) -> str | None:
        """The newest event that can be the cause: who, when and why."""
        return _decision(self.events, self.invoice and self.invoice.id, kinds, term)


def _decision(
    events: Sequence[Row[Any]],
    invoice_id: int | None,
    kinds: AbstractSet[EventKind],
    term: str | None,
) -> str | None:
    for event in reversed(events):
        if event.invoice_id not in {None, invoice_id}:
            continue
        if event.kind in kinds and _is_about(event, term):
            return _told(event)
        if kinds >= STARTS and _by_request(event):
            return _told(event)
    return None


def _is_about(event: Row[Any], term: str | None) -> bool:
    return event.kind != _K.SUBSCRIPTION_CHANGED or term in event.data.get("changes", ())


def _by_request(event: Row[Any]) -> bool:
    origin = event.data.get("origin", "scheduled")
    return event.kind == _K.ATTEMPT_PREPARED and origin not in NOT_DECIDED_HERE


def _told(event: Row[Any]) -> str:
    why = event.data.get("why") or event.data.get("reason")
    return f"{event.kind} by {event.by} at {event.at.isoformat()}" + (f": {why}" if why else "")


def _of_batch(
    connection: Connection,
    batch: Sequence[Mapping[str, Any]],
    now: datetime,
    made_at: datetime,
    comparison: Comparison,
) -> Iterator[Deviation]:
    invoices = outlook.invoices_named(connection, [line["invoice"] for line in batch])
    names = {line["subscription"] for line in batch}
    subscriptions = outlook.subscriptions_named(connection, names)
    events = outlook.happened_to(connection, [row.id for row in subscriptions.values()], made_at)
    for line in batch:
        subscription = subscriptions.get(line["subscription"])
        invoice = invoices.get(line["invoice"])
        if subscription is None:
            yield Deviation(line["invoice"], "vanished", str(line), "no such subscription", None)
            continue
        about = sorted([*events[subscription.id], *events[0]], key=lambda event: event.id)
        deviation = _compared(_Fact(line, invoice, about, now), comparison)
        if deviation is not None:
            yield deviation


def _compared(fact: _Fact, comparison: Comparison) -> Deviation | None:
    line, invoice = fact.line, fact.invoice
    if not line["charged"]:
        found = _charged_all_the_same(fact) if invoice and invoice.paid_at else None
    elif invoice is not None:
        found = _opened(fact, invoice)
    elif datetime.fromisoformat(line["at"]) > fact.now:
        comparison.counts["not_due_yet"] += 1
        return None
    else:
        because = fact.decision(STOPS | MOVES, "every")
        found = fact.deviation("not_due", "the period has no invoice", because)
    if found is None:
        comparison.counts["as_planned"] += 1
    return found


def _charged_all_the_same(fact: _Fact) -> Deviation:
    reason = fact.line["reason"]
    because = fact.decision(STARTS | CARDS if needs_a_card(reason) else STARTS)
    if reason.startswith("in flight"):
        because = "the gateway said that the charge in flight was paid"
    return fact.deviation("charged", "paid", because)


def _opened(fact: _Fact, invoice: Row[Any]) -> Deviation | None:
    money = Money.from_minor(invoice.amount_minor, invoice.currency)
    as_agreed = (f"{money.amount:f}", money.currency) == (
        fact.line["amount"],
        fact.line["currency"],
    )
    if not as_agreed:
        return fact.deviation("changed", f"{money}", fact.decision(CHANGES, "amount"))
    if invoice.period_start != datetime.fromisoformat(fact.line["start"]):
        began = f"the period begins at {invoice.period_start.isoformat()}"
        return fact.deviation("moved", began, fact.decision(MOVES, "every"))
    return None if invoice.status == "paid" else _not_paid(fact, invoice)


def _not_paid(fact: _Fact, invoice: Row[Any]) -> Deviation:
    if invoice.status in {"void", "uncollectible"}:
        because = _with_decision(invoice.reason, fact)
        return fact.deviation(invoice.status, f"invoice is {invoice.status}", because)
    if invoice.in_flight:
        return fact.deviation("unknown", "sent, and not answered yet", "the gateway is asked")
    if invoice.reason is not None:
        return fact.deviation("open", "not paid", _with_decision(invoice.reason, fact))
    return _due(fact, invoice.next_attempt_at)


def _due(fact: _Fact, at: datetime | None) -> Deviation:
    if at is not None and fact.now - at <= LATE_AFTER:
        return fact.deviation("open", "not charged yet", f"to be charged at {at.isoformat()}")
    return fact.deviation("open", "due, and not charged", fact.decision(STOPS))


def _with_decision(reason: str | None, fact: _Fact) -> str | None:
    told = [text for text in (reason, fact.decision(STOPS)) if text]
    return "; ".join(told) or None


# --- what nobody planned ---------------------------------------------------------------------


def _unforeseen(
    connection: Connection, rows: Sequence[Row[Any]], made_at: datetime
) -> Iterator[Deviation]:
    events = outlook.happened_to(connection, {row.subscription_id for row in rows}, made_at)
    for row in rows:
        money = Money.from_minor(row.amount_minor, row.currency)
        yield Deviation(
            row.reference_id,
            "unforeseen",
            "nothing",
            f"{money} paid at {row.paid_at.isoformat()}",
            _why_unforeseen(row, events[row.subscription_id], made_at),
        )


def _why_unforeseen(row: Row[Any], events: Sequence[Row[Any]], made_at: datetime) -> str | None:
    if row.kind == ONE_OFF and row.created_at >= made_at:
        return f"a one-off charge, asked for at {row.created_at.isoformat()}"
    if row.subscribed_at >= made_at:
        return f"subscribed after the preview, at {row.subscribed_at.isoformat()}"
    return _decision(events, row.id, STARTS, None) or _decision(events, row.id, MOVES, "every")
