"""States that few seeds reach. A campaign in which nobody came to one has not tested it.

Each life names its own: see `must_reach` there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import select

from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store

SOLD_BY_A_FORGOTTEN_LIFE = "sold by a life that was forgotten"
FOUND_PAID = "take-over found it paid"
ANOTHER_BOOKS = "another book's invoice found"

_ENDED = {"attempt.declined", "attempt.not_charged"}

History = Sequence[Any]  # the events of one attempt, oldest first


def _has(kind: str, **data: object) -> Callable[[History], bool]:
    def holds(history: History) -> bool:
        return any(
            event.kind == kind and all(event.data.get(name) == v for name, v in data.items())
            for event in history
        )

    return holds


def _says(kind: str, name: str) -> Callable[[History], bool]:
    def holds(history: History) -> bool:
        return any(event.kind == kind and event.data.get(name) for event in history)

    return holds


def _waits_because(reason: str) -> Callable[[History], bool]:
    def holds(history: History) -> bool:
        return any(
            event.kind == "invoice.waiting" and (event.data.get("reason") or "").startswith(reason)
            for event in history
        )

    return holds


def _follows(kind: str, after: set[str]) -> Callable[[History], bool]:
    def holds(history: History) -> bool:
        before = False
        for event in history:
            if before and event.kind == kind:
                return True
            before = before or event.kind in after
        return False

    return holds


def _found_by_reference(status: str) -> Callable[[History], bool]:
    """Whoever took the attempt over found its invoice at the gateway, in this state."""

    def holds(history: History) -> bool:
        taken = [n for n, event in enumerate(history) if event.kind == "attempt.claimed"]
        after = history[taken[0] + 1 :] if taken else ()
        return any(
            call["operation"] == "find" and f'"status": "{status}"' in (call["answer"] or "")
            for event in after
            for call in event.data.get("calls", ())
        )

    return holds


_SAYS_OTHERWISE = {
    False: {"attempt.succeeded", "attempt.surplus"},
    True: {"attempt.contradicted"},
}
"""Of a word that it is paid, or not."""


def _resolved_otherwise(history: History) -> bool:
    """A named person's word, and later another one of the gateway."""
    paid = None
    for event in history:
        if event.kind == "attempt.resolved":
            paid = event.data["paid"]
        elif paid is not None and event.kind in _SAYS_OTHERWISE[paid]:
            return True
    return False


def _told(words: str) -> Callable[[History], bool]:
    def holds(history: History) -> bool:
        return any(
            words in str(event.data.get(name))
            for event in history
            for name in ("reason", "evidence")
        )

    return holds


OF_ATTEMPTS: dict[str, Callable[[History], bool]] = {
    "take-over found it pending": _found_by_reference("process_pending"),
    FOUND_PAID: _found_by_reference("processed"),
    "take-over found it expired": _found_by_reference("expired"),
    SOLD_BY_A_FORGOTTEN_LIFE: _has("attempt.submitted", sold_by="somebody else"),
    "late money paid the invoice": _follows("attempt.succeeded", _ENDED),
    "late money was surplus": _follows("attempt.surplus", _ENDED),
    "surplus": _has("attempt.surplus"),
    "grace ended": _follows("attempt.not_charged", {"attempt.unpaid_final"}),
    "money within the grace": _follows("attempt.succeeded", {"attempt.unpaid_final"}),
    "declined after its expiry": _follows("attempt.declined", {"attempt.unpaid_final"}),
    "contradiction": _has("attempt.contradicted"),
    "undecided again after its end": _follows("attempt.contradicted", _ENDED),
    "resolved by a person": _has("attempt.resolved"),
    "resolved, and the gateway said otherwise": _resolved_otherwise,
    "answer that does not fit the order": _has("attempt.quarantined"),
    ANOTHER_BOOKS: _told("belongs to another book"),
    "undecided for a day": _has("attempt.undecided"),
    "forbidden by a rule": _has("attempt.forbidden"),
    "given back": _has("attempt.postponed"),
    "too late after the commit": _has("attempt.not_charged", reason="too late after the commit"),
}

OF_INVOICES: dict[str, Callable[[History], bool]] = {
    "poison held": _waits_because("keeps_crashing"),
    "recovery ended": _has("recovery.ended"),
    "retry ordered": _has("retry.ordered"),
    "voided by its cancellation": _has("invoice.voided", reason="cancelled"),
    "voided by a person": _has("invoice.voided", why="asked"),
    "marked as paid by a person": _has("invoice.marked_paid"),
    "paid after a decline": _has("payment.recovered"),
    "card needed": _has("card.needed"),
}

OF_SUBSCRIPTIONS: dict[str, Callable[[History], bool]] = {
    "an amount agreed for later counts": _has("subscription.repriced"),
    "a pause ended by itself": _says("subscription.resumed", "resumed_at"),
    "next date moved": _says("subscription.changed", "next_period_begins"),
    "subscribed beside another": lambda history: any(
        event.kind == "subscription.subscribed" and event.by == "somebody" for event in history
    ),
    "forgiven": _has("subscription.forgiven"),
    "instalments ended": lambda history: any(
        event.kind == "invoice.opened" and event.data.get("last_period") for event in history
    ),
}

IN_EVERY_LIFE = frozenset(
    {*OF_ATTEMPTS, *OF_INVOICES, *OF_SUBSCRIPTIONS}
    - {FOUND_PAID, SOLD_BY_A_FORGOTTEN_LIFE, ANOTHER_BOOKS}
)
"""What some thousand seeds of any kind have to come to."""


def reached(store: Store) -> Counter[str]:
    """How many attempts, invoices or subscriptions of these books came to each state."""
    with store.reading() as connection:
        events = connection.execute(select(tables.events).order_by(tables.events.c.id)).all()
    by_attempt: defaultdict[int, list[Any]] = defaultdict(list)
    by_invoice: defaultdict[int, list[Any]] = defaultdict(list)
    by_subscription: defaultdict[int, list[Any]] = defaultdict(list)
    for event in events:
        if event.attempt_id is not None:
            by_attempt[event.attempt_id].append(event)
        if event.invoice_id is not None:
            by_invoice[event.invoice_id].append(event)
        if event.subscription_id is not None:
            by_subscription[event.subscription_id].append(event)
    counts: Counter[str] = Counter()
    for states, histories in (
        (OF_ATTEMPTS, by_attempt),
        (OF_INVOICES, by_invoice),
        (OF_SUBSCRIPTIONS, by_subscription),
    ):
        for history in histories.values():
            counts.update(name for name, holds in states.items() if holds(history))
    return counts
