from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.domain import attempt as attempt_rules
from billing_worker.domain import invoice as invoice_rules
from billing_worker.domain.attempt import Origin
from billing_worker.domain.catch_up import Action, Planned
from billing_worker.domain.events import EventKind
from billing_worker.domain.statement import MODERATION, UNSOLD_STATUSES
from billing_worker.domain.subscription import Subscription
from billing_worker.persistence.schema.columns import Instant
from billing_worker.persistence.schema.tables import (
    attempts,
    events,
    invoices,
    subscriptions,
)


def open_periods(
    connection: Connection,
    due: Sequence[tuple[Subscription, Planned]],
    now: datetime,
    enqueue_at: datetime,
) -> list[tuple[int, int, int]]:
    """Write one invoice per due period, open or waived as planned.

    Returns (invoice id, subscription id, period number). `enqueue_at` is for invoices that are
    charged now: the caller wakes a worker, and the sweep does so again at that time. A period that
    already has its invoice is skipped: the unique key stops a second one. A period that was taken
    back is opened again.
    """
    if not due:
        return []
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    rows = [_open_row(subscription, planned, now, enqueue_at) for subscription, planned in due]
    statement = dialect.insert(invoices).returning(
        invoices.c.id, invoices.c.subscription_id, invoices.c.period_number
    )
    statement = statement.on_conflict_do_update(
        index_elements=["subscription_id", "period_number"],
        set_={name: statement.excluded[name] for name in _OPENED_ANEW},
        where=and_(invoices.c.status == "void", invoices.c.reason == invoice_rules.TAKEN_BACK),
    )
    return [
        (row.id, row.subscription_id, row.period_number)
        for row in connection.execute(statement, rows)
    ]


_OPENED_ANEW = (
    "period_start", "period_end", "amount_minor", "currency", "description", "status", "reason",
    "next_attempt_at", "enqueue_at", "not_charged_count", "created_at", "next_origin",
    "first_declined_at",
)  # fmt: skip


def _open_row(
    subscription: Subscription, planned: Planned, now: datetime, enqueue_at: datetime
) -> dict[str, Any]:
    period, at = planned.period, planned.at
    price = subscription.price_at(period.start)
    return {
        "reference_id": invoice_rules.reference_for(subscription.reference_id, period.number),
        "subscription_id": subscription.id,
        "period_number": period.number,
        "period_start": period.start,
        "period_end": period.end,
        "amount_minor": price.minor,
        "currency": price.currency,
        "description": subscription.description,
        "status": "void" if planned.action is Action.WAIVE else "open",
        "reason": planned.reason,
        "next_attempt_at": at,
        "enqueue_at": enqueue_at if at == now else at,
        "not_charged_count": 0,
        "created_at": now,
    }


def _due_by(moment: Column[datetime]) -> Select[Any]:
    row_id = moment.table.c.id
    return (
        select(row_id)
        .where(moment <= bindparam("now", type_=moment.type))
        .order_by(moment)
        .limit(bindparam("most", type_=Integer()))
        .with_for_update(skip_locked=True)
    )


_THESE: BindParameter[int] = bindparam("ids", expanding=True)
_RING_DUE = _due_by(invoices.c.enqueue_at)
_RING_AGAIN = (
    update(invoices).where(invoices.c.id.in_(_THESE)).values(enqueue_at=bindparam("again"))
)
_POLL_DUE = _due_by(attempts.c.next_poll_at)
_POLL_AGAIN = (
    update(attempts).where(attempts.c.id.in_(_THESE)).values(next_poll_at=bindparam("again"))
)


def due_to_ring(
    connection: Connection, now: datetime, ring_again_at: datetime, limit: int
) -> list[int]:
    """Return up to `limit` invoices that are due for a wake-up, and set the next one to
    `ring_again_at`.

    A lost message therefore loses no invoice.
    """
    ids = _taken(connection, _RING_DUE, now, limit)
    if ids:
        connection.execute(_RING_AGAIN, {"ids": ids, "again": ring_again_at})
    return ids


def _taken(connection: Connection, due: Select[tuple[int]], now: datetime, limit: int) -> list[int]:
    rows = connection.execute(due, {"now": now, "most": limit})
    return [row.id for row in rows]


def due_to_poll(
    connection: Connection, now: datetime, poll_again_at: datetime, limit: int
) -> list[int]:
    """Return up to `limit` attempts that are due for polling, and set their next poll."""
    ids = _taken(connection, _POLL_DUE, now, limit)
    if ids:
        connection.execute(_POLL_AGAIN, {"ids": ids, "again": poll_again_at})
    return ids


def poll_again(connection: Connection, attempt_id: int, when: datetime) -> None:
    """Make an attempt due for polling, even after its last poll."""
    connection.execute(_POLL_AGAIN, {"ids": [attempt_id], "again": when})


def poll_later(connection: Connection, attempt_id: int, when: datetime) -> None:
    asked = {"ids": [attempt_id], "again": when}
    connection.execute(_POLL_AGAIN.where(attempts.c.next_poll_at.is_not(None)), asked)


def find(connection: Connection, reference_id: str) -> Row[Any] | None:
    """Find an invoice by its reference, by an attempt's reference with or without the book's
    prefix, or by the gateway's id.
    """
    by_attempt = select(attempts.c.invoice_id).where(
        or_(attempts.c.reference_id == reference_id, attempts.c.gateway_id == reference_id)
    )
    named = [invoices.c.reference_id == reference_id, invoices.c.id.in_(by_attempt)]
    without_prefix = attempt_rules.invoice_and_number(reference_id)
    if without_prefix is not None:
        reference, number = without_prefix
        is_made = exists().where(
            attempts.c.invoice_id == invoices.c.id, attempts.c.number == number
        )
        named.append(and_(invoices.c.reference_id == reference, is_made))
    query = (
        select(
            invoices,
            subscriptions.c.reference_id.label("subscription_reference"),
            subscriptions.c.timezone,
            subscriptions.c.handed_over_at,
            subscriptions.c.dunning_policy,
        )
        .join(subscriptions, subscriptions.c.id == invoices.c.subscription_id)
        .where(or_(*named))
        # The reference of a one-off charge may look like an attempt's reference of another invoice.
        .order_by(case((invoices.c.reference_id == reference_id, 0), else_=1))
    )
    return connection.execute(query).first()


def of_subscription(connection: Connection, subscription_id: int) -> Sequence[Row[Any]]:
    query = (
        select(invoices)
        .where(invoices.c.subscription_id == subscription_id)
        .order_by(invoices.c.period_number)
    )
    return connection.execute(query).all()


def charges_due(connection: Connection, now: datetime) -> tuple[int, datetime | None]:
    """Return how many open invoices are due for a charge, and when the next one will be."""
    at = invoices.c.next_attempt_at
    query = select(
        func.count(case((at <= now, 1))), func.min(case((at > now, at)), type_=Instant)
    ).where(invoices.c.status == "open", at.is_not(None))
    due, next_at = connection.execute(query).one()
    return due, next_at


def opened_after(
    connection: Connection, subscription_id: int, instant: datetime
) -> Sequence[Row[Any]]:
    """Return invoices of periods that begin after `instant`, oldest first."""
    query = (
        select(invoices)
        .where(invoices.c.subscription_id == subscription_id, invoices.c.period_start > instant)
        .order_by(invoices.c.period_number)
    )
    return connection.execute(query).all()


def paid_after(connection: Connection, subscription_id: int, instant: datetime) -> list[str]:
    """Return references of what was paid after `instant` for periods that had begun by then."""
    c = invoices.c
    query = (
        select(c.reference_id)
        .where(c.subscription_id == subscription_id, c.paid_at > instant, c.period_start <= instant)
        .order_by(c.period_number)
    )
    return list(connection.execute(query).scalars())


def take_back_waived(connection: Connection, ids: Sequence[int]) -> None:
    """Allow waived periods to be opened again if they become due again."""
    connection.execute(
        update(invoices)
        .where(
            invoices.c.id.in_(ids),
            invoices.c.status == "void",
            invoices.c.reason.startswith(invoice_rules.WAIVED),
        )
        .values(reason=invoice_rules.TAKEN_BACK)
    )


def attempts_of(connection: Connection, invoice_id: int) -> Sequence[Row[Any]]:
    query = select(attempts).where(attempts.c.invoice_id == invoice_id).order_by(attempts.c.number)
    return connection.execute(query).all()


PAGE, SILENT, UNDECIDED, MISFIT = "page", "silent", "undecided", "misfit"
"""What is known of a submitted attempt. PAGE: unpaid on its page, as far as the gateway says.
SILENT: no answer. UNDECIDED: an answer without a decision. MISFIT: an answer that contradicts the
order.
"""

REOPENED = "reopened"
"""The gateway has taken back that the attempt ended unpaid."""

MODERATED = "moderated"
"""A person at the gateway has to release or refuse it."""

SAYS_NOTHING = ("no answer", "nothing new")


def _polled(*, found_none_of: Sequence[str]) -> ColumnElement[bool]:
    return exists().where(
        events.c.invoice_id == attempts.c.invoice_id,
        events.c.attempt_id == attempts.c.id,
        events.c.kind == EventKind.ATTEMPT_POLLED,
        events.c.data["found"].as_string().not_in(found_none_of),
    )


# A new page is pending before a customer opens it.
_UNTOUCHED_PAGE = and_(
    attempts.c.origin == Origin.LINK,
    attempts.c.outcome.is_(None),
    ~_polled(found_none_of=[*SAYS_NOTHING, *sorted(UNSOLD_STATUSES)]),
)
_KNOWN_OF_SUBMITTED = case(
    (attempts.c.outcome.endswith(MODERATION), MODERATED),
    (attempts.c.outcome.is_not(None), MISFIT),
    (_UNTOUCHED_PAGE, PAGE),
    (attempts.c.sale_status.is_not(None), UNDECIDED),
    (_polled(found_none_of=SAYS_NOTHING), UNDECIDED),
    else_=SILENT,
)


_again = attempts.alias("again")
_REOPENED = exists().where(
    _again.c.invoice_id == invoices.c.id, _again.c.undecided_since.is_not(None)
)


def known_of_submitted(connection: Connection, attempt_id: int) -> str:
    """Return PAGE, SILENT, UNDECIDED, MODERATED or MISFIT."""
    query = select(_KNOWN_OF_SUBMITTED).where(attempts.c.id == attempt_id)
    return str(connection.execute(query).scalar_one())


def summary(connection: Connection) -> Sequence[Row[Any]]:
    """Return count and sum of invoices, grouped by everything that decides their state.

    Of one that is still owed these are the status, the state of the newest attempt, what is known of it
    while it is submitted, and, without a next attempt, the reason and whether the wait ends by itself.
    Of the others, which are nearly all, it is the status.
    """
    return [*_closed(connection), *_owed(connection)]


_KEYS = ("status", "attempt_status", "known", "waits", "reason", "patient", "currency")


def _closed(connection: Connection) -> Sequence[Row[Any]]:
    nothing = [null().label(name) for name in _KEYS[1:-1]]
    query: Select[Any] = (
        select(
            invoices.c.status,
            *nothing,
            invoices.c.currency,
            func.count().label("invoices"),
            func.sum(invoices.c.amount_minor).label("minor"),
        )
        .where(invoices.c.status.in_(("paid", "void")))
        .group_by(invoices.c.status, invoices.c.currency)
        .order_by(invoices.c.status, invoices.c.currency)
    )
    return connection.execute(query).all()


def _owed(connection: Connection) -> Sequence[Row[Any]]:
    tries = attempts.alias("tries")
    newest = (
        select(tries.c.id)
        .where(tries.c.invoice_id == invoices.c.id)
        .order_by(tries.c.number.desc())
        .limit(1)
        .scalar_subquery()
    )
    waits = and_(invoices.c.status == "open", invoices.c.next_attempt_at.is_(None))
    fate = (
        select(
            invoices.c.status,
            attempts.c.status.label("attempt_status"),
            case(
                (attempts.c.status == "submitted", _KNOWN_OF_SUBMITTED), (_REOPENED, REOPENED)
            ).label("known"),
            invoices.c.currency,
            invoices.c.amount_minor,
            invoices.c.next_attempt_at.is_(None).label("waits"),
            case((waits, invoices.c.reason)).label("reason"),
            and_(waits, invoices.c.give_up_at.is_not(None)).label("patient"),
        )
        .select_from(invoices.outerjoin(attempts, attempts.c.id == newest))
        .where(invoices.c.status.in_(("open", "uncollectible")))
        .subquery()
    )
    keys = [fate.c[name] for name in _KEYS]
    query: Select[Any] = select(
        *keys, func.count().label("invoices"), func.sum(fate.c.amount_minor).label("minor")
    )
    return connection.execute(query.group_by(*keys).order_by(*keys)).all()


def oldest_unknown(connection: Connection) -> datetime | None:
    """Return since when the oldest unknown outcome is unknown: its submission, or when the gateway
    took its answer back.
    """
    since = func.coalesce(attempts.c.undecided_since, attempts.c.submitted_at)
    query = select(func.min(since)).where(is_unknown())
    return connection.execute(query).scalar()


def is_unknown() -> ColumnElement[bool]:
    """Of an attempt: its outcome is unknown. An unpaid page is not: it waits for the customer."""
    return or_(
        and_(attempts.c.status == literal_column("'submitted'"), ~_UNTOUCHED_PAGE),
        attempts.c.undecided_since.is_not(None),
    )


def surplus(connection: Connection) -> Sequence[Row[Any]]:
    """Return attempts that took money which is not owed, oldest first, unless all of it was
    returned.
    """
    query: Select[Any] = (
        select(
            attempts.c.reference_id,
            attempts.c.gateway_id,
            attempts.c.amount_minor,
            attempts.c.currency,
            attempts.c.settled_at,
            invoices.c.reference_id.label("invoice_reference"),
        )
        .join(invoices, invoices.c.id == attempts.c.invoice_id)
        .where(
            attempts.c.status == literal_column("'surplus'"),  # of the index's condition
            attempts.c.outcome.is_distinct_from("refunded"),
            attempts.c.outcome.is_distinct_from("charged_back"),
        )
        .order_by(attempts.c.id)
    )
    return connection.execute(query).all()
