"""Attempts with their invoices and subscriptions: locked, read, changed and written together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, and_, bindparam, exists, or_, select, update
from sqlalchemy import case as case_when

from billing_worker.domain.attempt import Attempt
from billing_worker.domain.card import Card, other_card
from billing_worker.domain.dunning import EQUAL_WITHIN
from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.outcome import Case
from billing_worker.domain.subscription import SubscriptionStatus
from billing_worker.persistence import cards
from billing_worker.persistence.book import identity
from billing_worker.persistence.rows import (
    ATTEMPTS,
    INVOICES,
    SUBSCRIPTIONS,
    TERMS,
    attempt_from,
    invoice_from,
    owner_from,
    subscription_from,
)
from billing_worker.persistence.schema.mapping import Update
from billing_worker.persistence.schema.tables import attempts, customers, invoices, subscriptions

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CaseKey:
    subscription_id: int
    invoice_id: int
    attempt_id: int


class LockedCases:
    """Attempts with their invoices and subscriptions, locked for one transaction.

    Callers change them in memory and call `save` once. Each row is held once: two attempts may
    share an invoice, and two invoices a subscription, so the second case sees the changes of the
    first.

    Every transaction locks subscriptions, then invoices, then attempts, each in the order of their
    ids. Two transactions therefore never deadlock.
    """

    def __init__(self, connection: Connection, keys: Iterable[CaseKey]) -> None:
        keys = list(keys)
        self._connection = connection
        rows = _locked(connection, subscriptions, {key.subscription_id for key in keys}).all()
        self._subscriptions = {row.id: subscription_from(row) for row in rows}
        self._owners = {row.id: owner_from(row) for row in rows}
        self._invoices = {
            row.id: invoice_from(row)
            for row in _locked(connection, invoices, {key.invoice_id for key in keys})
        }
        self._attempts = {
            row.id: attempt_from(row)
            for row in _locked(connection, attempts, {key.attempt_id for key in keys})
        }
        self._tries: dict[int, list[Attempt]] = defaultdict(list)
        self._cards: dict[int, list[Card]] = {}
        self._debts: dict[int, set[int]] = defaultdict(set)
        self._equal: dict[int, tuple[str, bool]] = {}
        self._before = (dict(self._attempts), dict(self._invoices), dict(self._subscriptions))

    def knows(self, key: CaseKey) -> bool:
        """Return False if the rows no longer exist, or now belong to other objects."""
        attempt = self._attempts.get(key.attempt_id)
        invoice = self._invoices.get(key.invoice_id)
        return (
            attempt is not None
            and invoice is not None
            and attempt.invoice_id == invoice.id
            and invoice.subscription_id == key.subscription_id
        )

    def find_debts(self) -> None:
        """Read the other debts of subscriptions that are past due or suspended."""
        behind = [s.id for s in self._subscriptions.values() if s.status in _BEHIND]
        if behind:
            for row in self._connection.execute(_DEBTS, {"ids": behind}):
                self._debts[row.subscription_id].add(row.id)

    def poll_back(self, keys: Sequence[CaseKey], now: datetime) -> None:
        """Read what the rules for declines need: earlier attempts, the card, a backup card."""
        if not keys:
            return
        invoice_ids = list({key.invoice_id for key in keys})
        for row in self._connection.execute(_TRIES, {"ids": invoice_ids}):
            self._tries[row.invoice_id].append(attempt_from(row))
        customer_ids = {self._subscriptions[key.subscription_id].customer_id for key in keys}
        self._cards = cards.of_customers(self._connection, customer_ids)
        self._now = now

    def find_equal_charges(self, keys: Sequence[CaseKey]) -> None:
        """Read what explains that the acquirer calls these attempts duplicates."""
        for key in keys:
            one = self._attempts[key.attempt_id]
            if one.card_id is not None and one.submitted_at is not None:
                equal = cards.equal_charge(
                    self._connection, one, since=one.submitted_at - EQUAL_WITHIN
                )
                self._equal |= {one.id: equal} if equal else {}

    def case(self, key: CaseKey) -> Case:
        attempt = self._attempts[key.attempt_id]
        subscription = self._subscriptions[key.subscription_id]
        owned = self._cards.get(subscription.customer_id, [])
        by_id = {card.id: card for card in owned}
        card = by_id.get(attempt.card_id or 0)
        equal, is_paid = self._equal.get(attempt.id, (None, False))
        return Case(
            attempt,
            self._invoices[key.invoice_id],
            subscription,
            tuple(self._tries[key.invoice_id]),
            card,
            other_card(card, subscription.card_id, owned, self._now) if card else None,
            by_id.get(subscription.card_id or 0),
            equal_charge=equal if is_paid else None,
            undecided_equal=None if is_paid else equal,
            owes_more=self._owes_more(key),
            owner=self._owners[key.subscription_id],
        )

    def _owes_more(self, key: CaseKey) -> bool:
        """Invoices that this transaction settles no longer count as owed."""
        others = self._debts[key.subscription_id] - {key.invoice_id}
        mine = (self._invoices.get(invoice_id) for invoice_id in others)
        return any(invoice is None or invoice.status is InvoiceStatus.OPEN for invoice in mine)

    def put(self, case: Case) -> None:
        self._attempts[case.attempt.id] = case.attempt
        self._invoices[case.invoice.id] = case.invoice
        self._subscriptions[case.subscription.id] = case.subscription

    def save(self) -> None:
        """Write the changes. Raises ConcurrentChange if a row differs from the locked row."""
        attempts_before, invoices_before, subscriptions_before = self._before
        _ATTEMPT.write(self._connection, _changed(attempts_before, self._attempts))
        _INVOICE.write(self._connection, _changed(invoices_before, self._invoices))
        _SUBSCRIPTION.write(self._connection, _changed(subscriptions_before, self._subscriptions))


def _changed(before: dict[int, _T], after: dict[int, _T]) -> list[tuple[_T, _T]]:
    return [(before[key], after[key]) for key in before if before[key] != after[key]]


_CUSTOMER = (
    select(customers.c.reference_id)
    .where(customers.c.id == subscriptions.c.customer_id)
    .scalar_subquery()
    .label("customer_reference")
)

# Built once: building a statement costs as much as sending it.
_LOCK = {
    table: select(*columns)
    .where(table.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(table.c.id)
    .with_for_update()
    for table, columns in (
        (subscriptions, [*TERMS, _CUSTOMER, identity.IDENTITY, identity.BOOK_PREFIX]),
        (invoices, [invoices]),
        (attempts, [attempts]),
    )
}


def _locked(connection: Connection, table: Table, ids: set[int]) -> Any:
    return connection.execute(_LOCK[table], {"ids": sorted(ids)})


_TRIES = select(attempts).where(attempts.c.invoice_id.in_(bindparam("ids", expanding=True)))

_BEHIND = frozenset({SubscriptionStatus.PAST_DUE, SubscriptionStatus.SUSPENDED})
_DEBTS = select(invoices.c.id, invoices.c.subscription_id).where(
    invoices.c.subscription_id.in_(bindparam("ids", expanding=True)),
    invoices.c.status == "open",
    or_(
        invoices.c.first_declined_at.is_not(None),
        # Waiting for a person after an attempt. Without an attempt it says nothing about the payer.
        and_(
            invoices.c.next_attempt_at.is_(None),
            invoices.c.paused_attempt_at.is_(None),
            invoices.c.reason.is_not(None),
            exists().where(attempts.c.invoice_id == invoices.c.id),
        ),
    ),
)


def owes_besides(connection: Connection, subscription_id: int, invoice_id: int) -> bool:
    """Whether another invoice of the subscription is in recovery, or held for a person."""
    rows = connection.execute(_DEBTS, {"ids": [subscription_id]})
    return any(row.id != invoice_id for row in rows)


_TO_ASK = (
    select(attempts.c.id, attempts.c.invoice_id, attempts.c.gateway_id)
    .add_columns(invoices.c.subscription_id)
    .join(invoices, invoices.c.id == attempts.c.invoice_id)
    .where(
        attempts.c.id.in_(bindparam("ids", expanding=True)),
        attempts.c.gateway_id.is_not(None),
        attempts.c.next_poll_at.is_not(None),
    )
    .order_by(attempts.c.id)
)


def keys_of(connection: Connection, attempt_ids: Sequence[int]) -> list[tuple[CaseKey, str]]:
    """Return (key, gateway id) of the attempts that the gateway can be polled for."""
    rows = connection.execute(_TO_ASK, {"ids": list(attempt_ids)})
    return [(CaseKey(row.subscription_id, row.invoice_id, row.id), row.gateway_id) for row in rows]


_SUBMIT = (
    update(attempts)
    .where(
        attempts.c.id == bindparam("row_id"),
        attempts.c.fence == bindparam("our_fence"),
        attempts.c.status == "prepared",
    )
    .values(
        status="submitted",
        gateway_id=bindparam("new_gateway_id"),
        bearer=bindparam("new_bearer"),
        submitted_at=bindparam("new_submitted_at"),
        next_poll_at=bindparam("new_next_poll_at"),
    )
)
_IN_FLIGHT = (
    update(invoices)
    .where(invoices.c.id.in_(bindparam("ids", expanding=True)), invoices.c.status == "open")
    .values(next_attempt_at=None, enqueue_at=None, reason=None)
)


@dataclass(frozen=True, slots=True)
class Submission:
    attempt: Attempt
    gateway_id: str
    bearer: bytes  # encrypted
    next_poll_at: datetime


def mark_submitted(
    connection: Connection, submissions: Sequence[Submission], now: datetime
) -> None:
    """Move attempts from prepared to submitted under their fence. Raises ConcurrentChange if any
    row does not match.
    """
    if not submissions:
        return
    moved = connection.execute(
        _SUBMIT,
        [
            {
                "row_id": s.attempt.id,
                "our_fence": s.attempt.fence,
                "new_gateway_id": s.gateway_id,
                "new_bearer": s.bearer,
                "new_submitted_at": now,
                "new_next_poll_at": s.next_poll_at,
            }
            for s in submissions
        ],
    )
    open_ = connection.execute(_IN_FLIGHT, {"ids": [s.attempt.invoice_id for s in submissions]})
    if moved.rowcount != len(submissions) or open_.rowcount != len(submissions):
        raise ConcurrentChange("an attempt or its invoice moved before it was submitted")


_STAYS_SOLD = bindparam("new_status", type_=attempts.c.status.type) == "submitted"
_ATTEMPT = Update(
    ATTEMPTS,
    attempts,
    [
        "status", "gateway_id", "claims", "lease_until", "submitted_at", "settled_at", "next_poll_at",
        "rechecks", "unpaid_since", "sale_status", "sale_resolution", "outcome", "original_code",
        "undecided_since", "heard_at", "resolved_at", "resolved_over", "maybe_sold",
    ],
    under=["status", "fence"],
    # The bearer is deleted as soon as the outcome of the sale is known.
    bearer=case_when((_STAYS_SOLD, attempts.c.bearer)),
    page=case_when((_STAYS_SOLD, attempts.c.page)),
)  # fmt: skip
_INVOICE = Update(
    INVOICES,
    invoices,
    [
        "status", "reason", "next_attempt_at", "enqueue_at", "not_charged_count", "paid_at",
        "paused_attempt_at", "next_origin", "first_declined_at", "give_up_at", "void_if_unpaid",
    ],
    under=["status"],
)  # fmt: skip
_SUBSCRIPTION = Update(
    SUBSCRIPTIONS,
    subscriptions,
    ["status", "schedule", "series_start", "next_period", "next_billing_at", "cancels_at"],
    under=["status"],
)


def save_open(
    connection: Connection,
    attempts_changed: list[tuple[Attempt, Attempt]],
    invoices_changed: list[tuple[Invoice, Invoice]],
) -> None:
    """Write (before, after) pairs. The caller holds locks on their subscription and invoices."""
    _ATTEMPT.write(connection, attempts_changed)
    _INVOICE.write(connection, invoices_changed)


def created_once(connection: Connection, *, test_mode: bool) -> tuple[str, str] | None:
    """Return reference and gateway id of the newest attempt that was surely created only once."""
    query = (
        select(attempts.c.reference_id, attempts.c.gateway_id)
        .where(
            attempts.c.gateway_id.is_not(None),
            attempts.c.submitted_at.is_not(None),
            attempts.c.fence == 1,
            attempts.c.test_mode == test_mode,
        )
        .order_by(attempts.c.id.desc())
        .limit(1)
    )
    row = connection.execute(query).first()
    return (row.reference_id, row.gateway_id) if row else None
