"""Compares a preview with the books: what happened as planned, and why the rest did not.

A recorded fact explains each deviation: the invoice's own reason, the gateway's answer, or an event
after the preview with name, time and reason. An unexplained deviation is a bug or an intrusion, and
a person must look at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain.catch_up import CATCH_UP_RULE, LATE_AFTER
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import is_paid_elsewhere
from billing_worker.domain.money import Money
from billing_worker.domain.subscription import ONE_OFF
from billing_worker.persistence import forecast
from billing_worker.persistence.claims import AFTER_OLDER
from billing_worker.persistence.store import Store
from billing_worker.persistence.switches import SALES_OFF
from billing_worker.services.forecast.line import (
    IN_FLIGHT,
    LATER,
    UNPLANNED,
    UNREADABLE,
    needs_a_card,
)

_K = EventKind
STOPS = frozenset(
    {
        _K.SUBSCRIPTION_MOVED,
        _K.SUBSCRIPTION_PAUSED,
        _K.SUBSCRIPTION_CANCELLED,
        _K.SUBSCRIPTION_ENDED,
        _K.SUBSCRIPTION_STUCK,
        _K.SUBSCRIPTION_HANDED_OVER,
        _K.CATCH_UP_HELD,
    }
)
STARTS = frozenset(
    {
        _K.SUBSCRIPTION_MOVED,
        _K.SUBSCRIPTION_RESUMED,
        _K.CANCELLATION_WITHDRAWN,
        _K.CATCH_UP_DECIDED,
        _K.SUBSCRIPTION_ARMED,
        _K.SUBSCRIPTION_TAKEN_BACK,
    }
)
CARDS = frozenset({_K.CARD_ADDED, _K.CARD_STORED})
"""These events only start charges that needed a card."""

MOVES = frozenset({_K.SUBSCRIPTION_RESUMED, _K.SUBSCRIPTION_CHANGED})
CHANGES = frozenset({_K.SUBSCRIPTION_CHANGED})
AMOUNT = frozenset({"amount", "new_amount"})
DATES = frozenset({"every", "anchor_at"})
PERIODS = DATES | {"ends_at"}
"""Events that may cause each kind of deviation. A new description, for example, explains no missing
charge.
"""

DELAYS = frozenset(
    {
        _K.INVOICE_WAITING,
        _K.INVOICE_OPENED,
        _K.CATCH_UP_DECIDED,
        _K.ATTEMPT_DECLINED,
        _K.ATTEMPT_NOT_CHARGED,
        _K.ATTEMPT_FORBIDDEN,
        _K.RETRY_ORDERED,
    }
)
"""Events of an invoice that explain another day of its charge, if they give a reason."""

ENDS = frozenset({_K.INVOICE_PAID, _K.INVOICE_VOIDED, _K.RECOVERY_ENDED})

BEING_WRITTEN = timedelta(seconds=30)
"""A decision carries the time of its beginning. The preview may have been read before its
commit.
"""

NOT_DECIDED_HERE = frozenset({"scheduled", "dunning"})
"""Origins of attempts without a named person."""


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
    """Collects `counts` of as_planned, not_due_yet and the kinds of deviations."""

    counts: Counter[str] = field(default_factory=Counter)
    unexplained: int = 0

    def add(self, deviation: Deviation) -> None:
        self.counts[deviation.kind] += 1
        self.unexplained += deviation.because is None


def compare(
    store: Store,
    now: datetime,
    made_at: datetime,
    read_by: datetime,
    until: datetime,
    lines: Iterable[Mapping[str, Any]],
    comparison: Comparison,
) -> Iterator[Deviation]:
    """Yield deviations of the books from a saved preview (`Expected.as_dict` lines).

    The preview was begun at `made_at` and had read the whole book at `read_by`; payments in between
    may be missing from its lines. Counts go to `comparison`. Memory grows only with the references
    of the preview.
    """
    known: set[str] = set()
    rest = iter(lines)
    while batch := list(islice(rest, forecast.IN)):
        known.update(line["invoice"] for line in batch)
        with store.reading() as connection:
            forecast.at_one_moment(connection)
            found = list(_of_batch(connection, batch, _Span(made_at, until, now), comparison))
        yield from _counted(found, comparison)
    with store.reading() as connection:
        for page in forecast.paid_between(connection, read_by, min(now, until)):
            unforeseen = [row for row in page if row.reference_id not in known]
            yield from _counted(_unforeseen(connection, unforeseen, made_at), comparison)


def _counted(found: Iterable[Deviation], comparison: Comparison) -> Iterator[Deviation]:
    for deviation in found:
        comparison.add(deviation)
        yield deviation


# --- what was planned ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Span:
    """The compared time: from the preview to the end of its forecast, seen from now."""

    made_at: datetime
    until: datetime
    now: datetime


@dataclass(frozen=True, slots=True)
class _Fact:
    """A planned line with the present state of the books."""

    line: Mapping[str, Any]
    subscription: Row[Any]
    invoice: Row[Any] | None
    paid_by: Row[Any] | None  # the attempt that paid it
    events: Sequence[Row[Any]]  # since the preview; about it or about no subscription
    span: _Span

    @property
    def planned(self) -> str:
        line = self.line
        if not line["charged"]:
            return f"no charge: {line['reason']}"
        return f"{line['amount']} {line['currency']} at {line['at']}"

    @property
    def paid_in_time(self) -> bool:
        """Whether a charge paid it within the compared time: later charges are not compared."""
        if self.invoice is None or is_paid_elsewhere(self.invoice.reason):
            return False
        paid_at = self.invoice.paid_at
        return paid_at is not None and bool(paid_at <= self.span.until)

    def deviation(self, kind: str, happened: str, because: str | None) -> Deviation:
        return Deviation(self.line["invoice"], kind, self.planned, happened, because)

    def decision(
        self, kinds: AbstractSet[EventKind], terms: AbstractSet[str] = frozenset()
    ) -> str | None:
        """Return the newest event that can be the cause: name, time, reason."""
        return _decision(self.events, self.invoice and self.invoice.id, kinds, terms)

    def switch(self, *, on: bool) -> str | None:
        """Return the newest stop or start of sales. It explains only invoices that wait or waited
        for it.
        """
        turns = [e for e in self.events if e.kind == _K.SALES_SWITCHED and e.data.get("on") is on]
        return _told(turns[-1]) if turns else None

    def own_events(self, kinds: AbstractSet[EventKind]) -> list[str]:
        """Return the invoice's own events that give a reason, oldest first."""
        own = [e for e in self.events if self.invoice and e.invoice_id == self.invoice.id]
        return [_told(event) for event in own if event.kind in kinds and _why(event)]


def _until_sent(events: Sequence[Row[Any]], paid_by: Row[Any] | None) -> Sequence[Row[Any]]:
    """Leave out events after the charge: they are no reason for it."""
    for position, event in enumerate(events):
        sent = paid_by is not None and event.attempt_id == paid_by.id
        if sent and event.kind == _K.ATTEMPT_SUBMITTED:
            return events[:position]
    return events


def _decision(
    events: Sequence[Row[Any]],
    invoice_id: int | None,
    kinds: AbstractSet[EventKind],
    terms: AbstractSet[str],
) -> str | None:
    for event in reversed(events):
        if event.invoice_id not in {None, invoice_id}:
            continue
        if event.kind in kinds and _is_about(event, terms):
            return _told(event)
        if kinds >= STARTS and _by_request(event):
            return _told(event)
    return None


def _is_about(event: Row[Any], terms: AbstractSet[str]) -> bool:
    changed = event.data.get("changes", ())
    return event.kind != _K.SUBSCRIPTION_CHANGED or not terms.isdisjoint(changed)


def _by_request(event: Row[Any]) -> bool:
    origin = event.data.get("origin", "scheduled")
    return event.kind == _K.ATTEMPT_PREPARED and origin not in NOT_DECIDED_HERE


def _told(event: Row[Any]) -> str:
    why = _why(event)
    return f"{event.kind} by {event.by} at {event.at.isoformat()}" + (f": {why}" if why else "")


def _why(event: Row[Any]) -> str | None:
    data = event.data
    rule = data.get("catch_up") or {}
    return data.get("why") or data.get("reason") or rule.get("reason") or rule.get("rule")


def _of_batch(
    connection: Connection,
    batch: Sequence[Mapping[str, Any]],
    span: _Span,
    comparison: Comparison,
) -> Iterator[Deviation]:
    invoices = forecast.invoices_named(connection, [line["invoice"] for line in batch])
    paid_by = forecast.paid_by(connection, [row.id for row in invoices.values() if row.paid_at])
    names = {line["subscription"] for line in batch}
    subscriptions = forecast.subscriptions_named(connection, names)
    ids = [row.id for row in subscriptions.values()]
    events = forecast.happened_to(connection, ids, span.made_at - BEING_WRITTEN)
    for line in batch:
        subscription = subscriptions.get(line["subscription"])
        invoice = invoices.get(line["invoice"])
        if subscription is None:
            yield Deviation(line["invoice"], "vanished", str(line), "no such subscription", None)
            continue
        about = sorted([*events[subscription.id], *events[0]], key=lambda event: event.id)
        paid = paid_by.get(invoice.id) if invoice else None
        fact = _Fact(line, subscription, invoice, paid, about, span)
        deviation = _compared(fact, comparison)
        if deviation is not None:
            yield deviation


def _compared(fact: _Fact, comparison: Comparison) -> Deviation | None:
    line, invoice = fact.line, fact.invoice
    if not line["charged"]:
        found = _charged_all_the_same(fact) if fact.paid_in_time else None
    elif invoice is not None:
        found = _opened(fact, invoice)
    elif _is_still_to_come(fact):
        comparison.counts["not_due_yet"] += 1
        return None
    else:
        because = fact.decision(STOPS | MOVES, PERIODS) or _why_not_planned(fact)
        found = fact.deviation("not_due", "the period has no invoice", because)
    if found is None:
        comparison.counts["as_planned"] += 1
    return found


def _is_still_to_come(fact: _Fact) -> bool:
    """Return whether its time has not come, or the next sweep opens it."""
    at, opens_at = datetime.fromisoformat(fact.line["at"]), fact.subscription.next_billing_at
    waits = opens_at is not None and opens_at <= at and not _is_over_by_then(fact)
    return at > fact.span.now or (waits and fact.span.now - at <= LATE_AFTER)


def _is_over_by_then(fact: _Fact) -> bool:
    cancels_at = fact.subscription.cancels_at
    return cancels_at is not None and cancels_at <= datetime.fromisoformat(fact.line["start"])


def _why_not_planned(fact: _Fact) -> str | None:
    """Return a reason stored in the subscription: a cancellation that no sweep has carried out yet,
    or an error.

    An error is reported once, perhaps before the preview, and may be corrected since.
    """
    if _is_over_by_then(fact):
        return fact.decision(frozenset({_K.CANCELLATION_SCHEDULED}))
    trouble = fact.subscription.trouble
    return f"the sweep cannot plan it: {trouble}" if trouble else None


# --- charged although it was not foreseen ----------------------------------------------------


def _charged_all_the_same(fact: _Fact) -> Deviation:
    fact = replace(fact, events=_until_sent(fact.events, fact.paid_by))
    reason = fact.line["reason"]
    because = (
        _sent_before(fact.paid_by, fact.span.made_at)
        or fact.decision(STARTS | CARDS if needs_a_card(reason) else STARTS)
        or _obstacle_is_gone(fact, reason)
    )
    return fact.deviation("charged", "paid", because)


def _sent_before(paid_by: Row[Any] | None, made_at: datetime) -> str | None:
    if paid_by is None or paid_by.submitted_at is None or paid_by.submitted_at >= made_at:
        return None
    sent = f"{paid_by.reference_id}, sent at {paid_by.submitted_at.isoformat()}"
    return f"the gateway said that {sent}, before the preview, was paid"


def _obstacle_is_gone(fact: _Fact, reason: str) -> str | None:
    """Return the event that removed an obstacle of this and of other charges, or None."""
    if reason == SALES_OFF:
        return fact.switch(on=True)
    if reason == AFTER_OLDER:
        return _elder_is_over(fact)
    if reason == IN_FLIGHT:
        return _newest(fact.own_events(frozenset({_K.ATTEMPT_DECLINED, _K.ATTEMPT_NOT_CHARGED})))
    if reason.startswith((UNPLANNED, UNREADABLE)):
        return f"no more trouble: {fact.paid_by.reference_id} was made" if fact.paid_by else None
    if reason == LATER or CATCH_UP_RULE in reason:
        return _newest(fact.own_events(frozenset({_K.INVOICE_OPENED, _K.INVOICE_WAITING})))
    return None


def _newest(told: Sequence[str]) -> str | None:
    return told[-1] if told else None


def _elder_is_over(fact: _Fact) -> str | None:
    own = fact.invoice.id if fact.invoice else None
    for event in reversed(fact.events):
        if event.kind in ENDS and event.invoice_id not in {None, own}:
            return f"an older invoice came first: {_told(event)}"
    return None


# --- as planned, or not ----------------------------------------------------------------------


def _opened(fact: _Fact, invoice: Row[Any]) -> Deviation | None:
    try:
        money = Money.from_minor(invoice.amount_minor, invoice.currency)
    except InvalidInput as error:
        trouble = f"{invoice.amount_minor} of {invoice.currency}: {error}"
        return fact.deviation("unreadable", "the invoice cannot be read", trouble)
    as_agreed = (f"{money.amount:f}", money.currency) == (
        fact.line["amount"],
        fact.line["currency"],
    )
    if not as_agreed:
        return fact.deviation("changed", f"{money}", fact.decision(CHANGES, AMOUNT))
    if invoice.period_start != datetime.fromisoformat(fact.line["start"]):
        began = f"the period begins at {invoice.period_start.isoformat()}"
        return fact.deviation("moved", began, fact.decision(MOVES, DATES))
    return _paid(fact) if invoice.status == "paid" else _not_paid(fact, invoice)


def _paid(fact: _Fact) -> Deviation | None:
    """Compare a paid line: as planned, unless the charge was on another day or a person recorded a
    payment elsewhere.
    """
    reason = fact.invoice.reason if fact.invoice else None
    if is_paid_elsewhere(reason):
        return fact.deviation("paid_elsewhere", "no charge", reason)
    planned = datetime.fromisoformat(fact.line["at"])
    paid_by = fact.paid_by
    sent = paid_by.submitted_at if paid_by else None
    if paid_by is None or sent is None or abs(sent - planned) <= LATE_AFTER:
        return None
    fact = replace(fact, events=_until_sent(fact.events, paid_by))
    happened = f"sent at {sent.isoformat()}"
    told = fact.own_events(DELAYS)
    decision = fact.decision(STOPS | STARTS | MOVES, DATES)
    if sent < planned:
        return fact.deviation("early", happened, _newest(told) or decision)
    # The reason for the delay; in the end it was charged.
    because = told[0] if told else decision
    nobody_came = f"nobody came for it before {paid_by.created_at.isoformat()}"
    return fact.deviation("late", happened, because or nobody_came)


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
    if at is not None and fact.span.now - at <= LATE_AFTER:
        return fact.deviation("open", "not charged yet", f"to be charged at {at.isoformat()}")
    return fact.deviation("open", "due, and not charged", fact.decision(STOPS))


def _with_decision(reason: str | None, fact: _Fact) -> str | None:
    decision = fact.switch(on=False) if reason == SALES_OFF else fact.decision(STOPS)
    told = [text for text in (reason, decision) if text]
    return "; ".join(told) or None


# --- what nobody planned ---------------------------------------------------------------------


def _unforeseen(
    connection: Connection, rows: Sequence[Row[Any]], made_at: datetime
) -> Iterator[Deviation]:
    ids = {row.subscription_id for row in rows}
    events = forecast.happened_to(connection, ids, made_at - BEING_WRITTEN)
    paid_by = forecast.paid_by(connection, [row.id for row in rows])
    for row in rows:
        if is_paid_elsewhere(row.reason):
            continue  # nothing was charged
        paid = paid_by.get(row.id)
        before = _until_sent(events[row.subscription_id], paid)
        yield Deviation(
            row.reference_id,
            "unforeseen",
            "nothing",
            f"{_amount(row)} paid at {row.paid_at.isoformat()}",
            _sent_before(paid, made_at) or _why_unforeseen(row, before, made_at),
        )


def _amount(row: Row[Any]) -> str:
    try:
        return str(Money.from_minor(row.amount_minor, row.currency))
    except InvalidInput:
        return f"{row.amount_minor} minor units of {row.currency}"


def _why_unforeseen(row: Row[Any], events: Sequence[Row[Any]], made_at: datetime) -> str | None:
    if row.kind == ONE_OFF and row.created_at >= made_at:
        return f"a one-off charge, asked for at {row.created_at.isoformat()}"
    if row.subscribed_at >= made_at:
        return f"subscribed after the preview, at {row.subscribed_at.isoformat()}"
    return _decision(events, row.id, STARTS, frozenset()) or _decision(
        events, row.id, MOVES, PERIODS
    )
