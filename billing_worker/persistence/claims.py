"""Claims: each due invoice goes to one worker at a time, under a lease and a fence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from billing_worker.domain import attempt as attempt_rules
from billing_worker.domain.attempt import LIVE, Attempt, AttemptStatus, Origin
from billing_worker.domain.errors import ConcurrentChange, InvariantBroken
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import Invoice, is_near
from billing_worker.domain.outgoing.notice import Agreement
from billing_worker.domain.statement import Owner
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.book import identity as book
from billing_worker.persistence.outbox.notices import OF_AGREEMENT, agreement_from
from billing_worker.persistence.rows import attempt_from, invoice_from, owner_from, trouble_of
from billing_worker.persistence.schema.columns import Instant
from billing_worker.persistence.schema.tables import (
    attempts,
    cards,
    customers,
    events,
    invoices,
    subscriptions,
)

NO_NOTICE = Agreement(None, is_one_off=True, had_trial=False, is_long=False)
"""Stands for an agreement that needs no notice."""


@dataclass(frozen=True, slots=True)
class DueInvoice:
    """A due open invoice, locked, with all its attempts so far."""

    invoice: Invoice
    attempts: tuple[Attempt, ...]
    card_id: int | None
    dunning_policy: str | None = None
    older_since: datetime | None = None
    """Set when an older invoice of the subscription is in recovery: since when the outcome of its
    last attempt is unknown, or NOT_UNKNOWN if it is known. None: no such invoice.
    """
    elsewhere_until: datetime | None = None
    """Until when another book may have billed the subscription: the latest of its import, its
    activation after a held import, and its return from a hand-over. None: never.
    """
    agreement: Agreement = NO_NOTICE
    subscription: str = ""  # its reference
    from_prefix: str | None = None  # prefix of the other book's references at the gateway

    @property
    def may_be_charged_elsewhere(self) -> bool:
        """Whether another book that had the subscription may have charged this invoice."""
        return self.elsewhere_until is not None and is_near(self.invoice, self.elsewhere_until)

    def comes_after_older(self, at: datetime, unknown_blocks: timedelta) -> bool:
        """Return whether the older invoice must be paid first, at the given time.

        An older invoice with an unknown outcome blocks this one for `unknown_blocks` at most.
        """
        return self.older_since is not None and at < self.older_since + unknown_blocks

    @property
    def live(self) -> Attempt | None:
        return next((a for a in self.attempts if a.status in LIVE), None)

    def besides(self, attempt: Attempt) -> tuple[Attempt, ...]:
        return tuple(other for other in self.attempts if other.id != attempt.id)


@dataclass(frozen=True, slots=True)
class UnreadableInvoice:
    """An open invoice that this version cannot read, or that has such an attempt.

    It must not stop the others.
    """

    id: int
    subscription_id: int
    reference_id: str
    period_number: int
    period_start: datetime
    told: str | None  # the reason that was already told
    reason: str


NOT_UNKNOWN = datetime(9000, 1, 1, tzinfo=UTC)
"""Stands for "no time": it is later than every real one."""

_older = invoices.alias("older")
_UNKNOWN_SINCE = (
    select(func.max(attempts.c.submitted_at))
    .where(attempts.c.invoice_id == _older.c.id, attempts.c.status == AttemptStatus.SUBMITTED)
    .scalar_subquery()
)
_OLDER_SINCE = (
    select(func.max(func.coalesce(_UNKNOWN_SINCE, literal(NOT_UNKNOWN, Instant))))
    .where(
        _older.c.subscription_id == invoices.c.subscription_id,
        _older.c.period_number < invoices.c.period_number,
        _older.c.status == "open",
        _older.c.first_declined_at.is_not(None),
        # In recovery: the next attempt has a date, the customer is waited for, or an attempt is
        # live.
        or_(
            _older.c.next_attempt_at.is_not(None),
            _older.c.give_up_at.is_not(None),
            _older.c.reason.is_(None),
        ),
    )
    .label("older_since")
)


HAS_LIVE_ATTEMPT = exists().where(
    attempts.c.invoice_id == invoices.c.id, attempts.c.status.in_(sorted(LIVE))
)


# Statements for every batch are built once: building one costs as much as sending it.
_THESE: BindParameter[int] = bindparam("ids", expanding=True)
_ARMED_AT = (
    select(func.max(events.c.at))
    .where(
        events.c.subscription_id == subscriptions.c.id,
        events.c.kind == EventKind.SUBSCRIPTION_ARMED,
    )
    .scalar_subquery()
)
"""The former book may have billed until then: a held import bills its periods late."""

OF_SUBSCRIPTION: list[Any] = [
    subscriptions.c.card_id,
    subscriptions.c.dunning_policy,
    subscriptions.c.reference_id.label("subscription"),
    *OF_AGREEMENT,
    subscriptions.c.from_prefix,
    subscriptions.c.taken_back_at,
    case(
        (
            subscriptions.c.from_book.is_not(None),
            func.coalesce(_ARMED_AT, subscriptions.c.created_at),
        )
    ).label("moved_in_at"),
    _OLDER_SINCE,
]
"""The columns that `read_with_attempts` needs beside those of an invoice."""

_WITH_TERMS = select(invoices, *OF_SUBSCRIPTION).join(
    subscriptions, subscriptions.c.id == invoices.c.subscription_id
)
_DUE = (
    _WITH_TERMS.where(
        invoices.c.id.in_(_THESE),
        invoices.c.status == "open",
        invoices.c.next_attempt_at <= bindparam("now", type_=invoices.c.next_attempt_at.type),
    )
    .order_by(invoices.c.id)
    .with_for_update(skip_locked=True, of=invoices)
)
_TRIES = select(attempts).where(attempts.c.invoice_id.in_(_THESE)).order_by(attempts.c.number)


def lock_due(
    connection: Connection, invoice_ids: Sequence[int], now: datetime
) -> tuple[list[DueInvoice], list[UnreadableInvoice]]:
    """Lock the invoices that are open and due. Skips rows that others have locked."""
    return _with_attempts(connection, _DUE, {"ids": list(invoice_ids), "now": now})


def lock_open(connection: Connection, *subscription_ids: int) -> list[DueInvoice]:
    """Lock every open invoice of locked subscriptions, due or not.

    Skips unreadable ones: they cannot be charged, and the claim reports them.
    """
    ours = invoices.c.subscription_id.in_(subscription_ids)
    return _locked(connection, ours, invoices.c.status == "open")[0]


def lock_one(connection: Connection, invoice_id: int) -> DueInvoice | None:
    """Lock one invoice in any state; the caller has locked its subscription.

    Raises InvariantBroken if it cannot be read.
    """
    found, unreadable = _locked(connection, invoices.c.id == invoice_id)
    if unreadable:
        raise InvariantBroken(
            f"{unreadable[0].reference_id} cannot be read: {unreadable[0].reason}"
        )
    return next(iter(found), None)


def lock_these(connection: Connection, invoice_ids: Sequence[int]) -> list[DueInvoice]:
    """Lock invoices in any state, but those that this version cannot read. The caller has locked
    their subscriptions.
    """
    return _locked(connection, invoices.c.id.in_(invoice_ids))[0]


def lock_given_up(connection: Connection, subscription_id: int) -> list[DueInvoice]:
    """Lock the uncollectible invoices of a locked subscription, as `lock_open` does the open ones."""
    ours = invoices.c.subscription_id == subscription_id
    return _locked(connection, ours, invoices.c.status == "uncollectible")[0]


def _locked(
    connection: Connection, *conditions: ColumnElement[bool]
) -> tuple[list[DueInvoice], list[UnreadableInvoice]]:
    query = _WITH_TERMS.where(*conditions).order_by(invoices.c.id)
    return _with_attempts(connection, query.with_for_update(of=invoices))


def overdue(connection: Connection, now: datetime, limit: int) -> list[tuple[int, str]]:
    """Return (invoice id, subscription reference) of invoices that have waited long enough for the
    customer and have no live attempt.
    """
    query = (
        select(invoices.c.id, subscriptions.c.reference_id)
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .where(invoices.c.give_up_at <= now, subscriptions.c.status != "paused", ~HAS_LIVE_ATTEMPT)
        .order_by(invoices.c.give_up_at)
        .limit(limit)
    )
    return [(row.id, row.reference_id) for row in connection.execute(query)]


def _with_attempts(
    connection: Connection, query: Select[Any], parameters: dict[str, Any] | None = None
) -> tuple[list[DueInvoice], list[UnreadableInvoice]]:
    rows = connection.execute(query, parameters).all()
    tries: dict[int, list[Row[Any]]] = defaultdict(list)
    for row in connection.execute(_TRIES, {"ids": [row.id for row in rows]}):
        tries[row.invoice_id].append(row)
    return read_with_attempts(rows, tries)


def read_with_attempts(
    rows: Iterable[Row[Any]], tries: Mapping[int, Sequence[Row[Any]]]
) -> tuple[list[DueInvoice], list[UnreadableInvoice]]:
    """Return rows of invoices and, by invoice id, of their attempts, in the order of the
    invoices.
    """
    read: list[DueInvoice] = []
    unreadable: list[UnreadableInvoice] = []
    for row in rows:
        try:
            made = tuple(attempt_from(one) for one in tries.get(row.id, ()))
            item = DueInvoice(
                invoice_from(row), made, row.card_id, row.dunning_policy, row.older_since,
                _elsewhere_until(row), agreement_from(row), row.subscription, row.from_prefix,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - reported by the caller, one row at a time
            unreadable.append(
                UnreadableInvoice(
                    row.id, row.subscription_id, row.reference_id, row.period_number,
                    row.period_start, row.reason, trouble_of(error),
                )
            )  # fmt: skip
        else:
            read.append(item)
    return read, unreadable


def _elsewhere_until(row: Row[Any]) -> datetime | None:
    return max(filter(None, (row.moved_in_at, row.taken_back_at)), default=None)


def prepare(
    connection: Connection,
    due: Sequence[tuple[DueInvoice, Origin]],
    *,
    test_mode: bool,
    now: datetime,
    lease_until: datetime,
) -> list[Attempt]:
    """Write the next attempt of each invoice, claimed with fence 1. Every invoice needs a
    card id.
    """
    if not due:
        return []
    prefix = book.read(connection).prefix
    prepared = {"status": AttemptStatus.PREPARED, "claims": 1, "lease_until": lease_until}
    rows = [
        next_attempt(item, prefix, test_mode=test_mode, now=now) | prepared | {"origin": origin}
        for item, origin in due
    ]
    result = connection.execute(
        insert(attempts).returning(attempts, sort_by_parameter_order=True), rows
    )
    return [attempt_from(row) for row in result]


def next_attempt(
    item: DueInvoice, prefix: str, *, test_mode: bool, now: datetime
) -> dict[str, Any]:
    number = len(item.attempts) + 1
    # A moved subscription keeps the other book's prefix there, to find what it may have charged.
    there = prefix if item.from_prefix is None else item.from_prefix
    return {
        "reference_id": attempt_rules.reference_for(item.invoice.reference_id, number, there),
        "invoice_id": item.invoice.id,
        "number": number,
        "card_id": item.card_id,
        "amount_minor": item.invoice.money.minor,
        "currency": item.invoice.money.currency,
        "test_mode": test_mode,
        "fence": 1,
        "rechecks": 0,
        "created_at": now,
    }


_TAKE_OVER = (
    update(attempts)
    .where(
        attempts.c.id == bindparam("row_id"),
        attempts.c.fence == bindparam("old_fence"),
        attempts.c.status == "prepared",
    )
    .values(
        fence=attempts.c.fence + 1,
        claims=attempts.c.claims + 1,
        lease_until=bindparam("new_lease_until"),
    )
)


def take_over(connection: Connection, lapsed: Sequence[tuple[Attempt, datetime]]) -> list[Attempt]:
    """Claim prepared attempts whose lease has expired: (attempt, new lease). Each fence grows by
    one.
    """
    if not lapsed:
        return []
    result = connection.execute(
        _TAKE_OVER,
        [
            {"row_id": attempt.id, "old_fence": attempt.fence, "new_lease_until": lease}
            for attempt, lease in lapsed
        ],
    )
    if result.rowcount != len(lapsed):
        raise InvariantBroken("an attempt was claimed although its invoice is locked")
    return [
        replace(a, fence=a.fence + 1, claims=a.claims + 1, lease_until=lease) for a, lease in lapsed
    ]


def renew(connection: Connection, attempt: Attempt, until: datetime) -> None:
    """Extend a lease. Raises ConcurrentChange if another worker has taken over the claim."""
    ours = connection.execute(
        update(attempts)
        .where(
            attempts.c.id == attempt.id,
            attempts.c.fence == attempt.fence,
            attempts.c.status == "prepared",
        )
        .values(lease_until=until)
    )
    if ours.rowcount != 1:
        raise ConcurrentChange(f"{attempt.reference_id} was claimed by another")


_UNCOUNT = (
    update(attempts)
    .where(
        attempts.c.id == bindparam("row_id"),
        attempts.c.fence >= bindparam("its_fence"),
        attempts.c.status == "prepared",
        attempts.c.claims > 0,
    )
    .values(claims=attempts.c.claims - 1)
)


def uncount(connection: Connection, ended: Sequence[Attempt]) -> None:
    """Do not count these claims as crashes.

    Their worker lives, or was replaced because it was slow, or failed for a reason outside the row.
    """
    if ended:
        rows = [{"row_id": attempt.id, "its_fence": attempt.fence} for attempt in ended]
        connection.execute(_UNCOUNT, rows)


def tell_why(connection: Connection, invoice_id: int, reason: str) -> None:
    """Write why an open invoice is not charged yet. Never overwrites the words of an order."""
    connection.execute(
        update(invoices)
        .where(
            invoices.c.id == invoice_id,
            invoices.c.status == "open",
            ~invoices.c.void_if_unpaid,
        )
        .values(reason=reason)
    )


NEIGHBOURS = 1_000


def workers_died_of_all(
    connection: Connection,
    attempt: Attempt,
    *,
    since: datetime,
    until: datetime,
    deaths: int,
    others: int,
) -> bool:
    """Return whether the crashes of this attempt are part of a general failure.

    True if, at `until`, at least `others` attempts from around the same time had as many crashes
    (`deaths`), and none of them had made progress since `since`.
    """
    around = and_(
        attempts.c.id.between(attempt.id - NEIGHBOURS, attempt.id + NEIGHBOURS),
        attempts.c.id != attempt.id,
    )
    went_on_since = or_(attempts.c.submitted_at > until, attempts.c.settled_at > until)
    died = select(func.count()).where(
        around,
        attempts.c.claims >= deaths,
        or_(attempts.c.status == "prepared", went_on_since),
    )
    went_on_before = exists().where(
        around,
        or_(
            attempts.c.submitted_at.between(since, until),
            attempts.c.settled_at.between(since, until),
        ),
    )
    query = select(and_(died.scalar_subquery() >= others, ~went_on_before))
    return bool(connection.execute(query).scalar_one())


_RING_LATER = (
    update(invoices).where(invoices.c.id.in_(_THESE)).values(enqueue_at=bindparam("new_enqueue_at"))
)


def ring_later(connection: Connection, invoice_ids: Sequence[int], when: datetime) -> None:
    """Postpone the next wake-up of invoices."""
    if invoice_ids:
        connection.execute(_RING_LATER, {"ids": list(invoice_ids), "new_enqueue_at": when})


AFTER_OLDER = "an older invoice comes first"


def wait(connection: Connection, waiting: Sequence[tuple[int, str]], until: datetime) -> None:
    """Postpone due invoices: (invoice id, reason). They stay due, and no worker is woken for them
    until then.
    """
    if waiting:
        connection.execute(
            update(invoices)
            .where(invoices.c.id == bindparam("row_id"))
            .values(enqueue_at=until, reason=bindparam("new_reason")),
            [{"row_id": row_id, "new_reason": reason} for row_id, reason in waiting],
        )


def date(connection: Connection, dated: Sequence[tuple[int, str, datetime]]) -> None:
    """Set a new date for the next attempt of due invoices: (invoice id, reason, date)."""
    if dated:
        connection.execute(
            update(invoices)
            .where(invoices.c.id == bindparam("row_id"))
            .values(
                next_attempt_at=bindparam("new_date"),
                enqueue_at=bindparam("new_date"),
                reason=bindparam("new_reason"),
            ),
            [{"row_id": row_id, "new_reason": why, "new_date": at} for row_id, why, at in dated],
        )


def stop_waiting(connection: Connection, subscription_ids: Sequence[int], now: datetime) -> None:
    """Wake the next invoice: the older one is paid or given up."""
    if subscription_ids:
        connection.execute(
            update(invoices)
            .where(
                invoices.c.subscription_id.in_(subscription_ids),
                invoices.c.status == "open",
                invoices.c.reason == AFTER_OLDER,
            )
            .values(enqueue_at=now)
        )


def await_card(connection: Connection, invoice_id: int, until: datetime) -> None:
    """Set how long to wait for the customer, unless it is already set."""
    connection.execute(
        update(invoices)
        .where(invoices.c.id == invoice_id, invoices.c.give_up_at.is_(None))
        .values(give_up_at=until)
    )


def be_patient(connection: Connection, invoice_id: int, until: datetime) -> None:
    query = update(invoices).where(invoices.c.id == invoice_id, invoices.c.give_up_at < until)
    connection.execute(query.values(give_up_at=until))


def hold(connection: Connection, held: Sequence[tuple[int, str]]) -> None:
    """Stop wake-ups for invoices until something changes: (invoice id, reason)."""
    if held:
        connection.execute(
            update(invoices)
            .where(invoices.c.id == bindparam("row_id"))
            .values(enqueue_at=None, next_attempt_at=None, reason=bindparam("new_reason")),
            [{"row_id": row_id, "new_reason": reason} for row_id, reason in held],
        )


@dataclass(frozen=True, slots=True)
class Payer:
    """The customer and the card that pay an attempt."""

    key: CaseKey
    customer_reference: str
    customer_name: str | None
    customer_email: str | None
    description: str | None
    customer_id: int
    card_token: bytes  # encrypted
    owner: Owner
    """The owner that an invoice must have to be sold to this payer."""


_PAYERS = (
    select(
        attempts.c.id.label("attempt_id"),
        attempts.c.invoice_id,
        invoices.c.subscription_id,
        invoices.c.description,
        subscriptions.c.customer_id,
        customers.c.reference_id.label("customer_reference"),
        customers.c.name,
        customers.c.email,
        cards.c.token,
        subscriptions.c.from_book,
        subscriptions.c.from_prefix,
        subscriptions.c.taken_back_at,
        book.IDENTITY,
        book.BOOK_PREFIX,
    )
    .join(invoices, invoices.c.id == attempts.c.invoice_id)
    .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
    .join(customers, customers.c.id == subscriptions.c.customer_id)
    .join(cards, cards.c.id == attempts.c.card_id)
    .where(attempts.c.id.in_(_THESE))
)


def payers(connection: Connection, attempt_ids: Sequence[int]) -> dict[int, Payer]:
    """Return payers by attempt id."""
    rows = connection.execute(_PAYERS, {"ids": list(attempt_ids)})
    return {row.attempt_id: _payer_from(row) for row in rows}


def _payer_from(row: Any) -> Payer:
    return Payer(
        CaseKey(row.subscription_id, row.invoice_id, row.attempt_id),
        row.customer_reference,
        row.name,
        row.email,
        row.description,
        row.customer_id,
        row.token,
        owner_from(row),
    )
