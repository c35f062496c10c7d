from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    delete,
    insert,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.domain.invoice import Invoice, is_near
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.book.identity import Book, ServerNow
from billing_worker.persistence.schema.tables import book, invoices, switches

SALES = "sales"
_SERVICE = "service:"
_RESTORED = "restored"
_SEARCHED = "searched"
_FIRST_LOSS = "first_loss"
_WAITS = "decisions"
_HANDED_OVER = "handed_over"

WAITS = (
    "these books are from a backup and wait for the decisions that they have forgotten: "
    "start sales with --restored when all of them have been said again"
)

SALES_OFF = "sales are switched off"
_PAUSED = " is paused: "


@dataclass(frozen=True, slots=True)
class Switches:
    """What may be charged: the kill switch, and which services of the gateway are paused
    and why.
    """

    sales_on: bool
    paused: dict[str, str]
    restored_at: datetime | None = None
    """When a loss of data was last announced or noticed."""

    book: Book | None = None
    server: ServerNow = field(default_factory=ServerNow)
    """The database server's report, read by the same query."""

    waits_since: datetime | None = None
    """Since when the book waits for lost decisions to be repeated. Sales are off meanwhile."""

    @property
    def have_forgotten(self) -> bool:
        """Return whether the book has lost data."""
        return self.restored_at is not None or self.waits_since is not None

    def may_be_forgotten(self, invoice: Invoice) -> bool:
        """Return whether the invoice may have been charged in the time that was lost.

        Counts one period beyond that time, because a repeated decision (a pause and its resumption)
        may move a period to another date. Counts any first period for a month, because a command
        that is sent again opens it on its arrival.
        """
        if self.waits_since is not None:
            return True
        if self.restored_at is None:
            return False
        said_again = invoice.period_number == 0 and invoice.period_start <= (
            self.restored_at + books.SAID_AGAIN_WITHIN
        )
        return is_near(invoice, self.restored_at) or said_again

    def obstacle(self, service: str) -> str | None:
        """Return why a sale through this service is not allowed, or None."""
        if not self.sales_on:
            return SALES_OFF
        if service in self.paused:
            return f"{service}{_PAUSED}{self.paused[service]}"
        return None


_COLUMNS = (switches.c.name, switches.c.is_on, switches.c.reason, switches.c.changed_at)


@cache
def _all(of_the_server: tuple[ColumnElement[Any], ...]) -> Select[Any]:
    """Built once for each kind of server: building it costs as much as sending it."""
    with_book = switches.join(book, true())
    return select(*_COLUMNS, *books.BOOK_COLUMNS, *of_the_server).select_from(with_book)


def read(connection: Connection) -> Switches:
    """Read all switches in one query. A missing sales row counts as off, as in `sales_are_on`.

    The query includes book and server, so that no charge is submitted on a server that has lost
    data.
    """
    rows = connection.execute(_all(books.server_columns(connection))).all()
    return Switches(
        sales_on=any(row.name == SALES and row.is_on for row in rows),
        paused={
            row.name.removeprefix(_SERVICE): row.reason or "paused"
            for row in rows
            if row.name.startswith(_SERVICE) and not row.is_on
        },
        restored_at=next((row.changed_at for row in rows if row.name == _RESTORED), None),
        waits_since=next((row.changed_at for row in rows if row.name == _WAITS), None),
        book=books.book_from(rows[0]) if rows else None,
        server=books.server_from(rows[0]) if rows else ServerNow(),
    )


_SEARCH = select(switches.c.is_on, switches.c.changed_at).where(switches.c.name == _SEARCHED)
"""`is_on`: searched until then. Otherwise a loss is to be searched from then on."""


def mark_restored(connection: Connection, *, by: str, reason: str | None, now: datetime) -> None:
    """Mark the book as restored: whatever is due now may have been charged in the lost time."""
    _mark(connection, _RESTORED, by=by, reason=reason, now=now)
    _begin_search(connection, by=by, reason=reason, now=now)


def _begin_search(connection: Connection, *, by: str, reason: str | None, now: datetime) -> None:
    """Note since when closed invoices are to be searched: since the last search, if that is recent, or
    since an older loss that nobody has searched after.
    """
    row = connection.execute(_SEARCH).one_or_none()
    goes_on = row is not None and (not row.is_on or row.changed_at >= now - books.SAID_AGAIN_WITHIN)
    since = row.changed_at if row is not None and goes_on else now
    _mark(connection, _SEARCHED, by=by, reason=reason, now=since, is_on=False)
    if not goes_on:
        _mark(connection, _FIRST_LOSS, by=by, reason=reason, now=now)


def searched_until(connection: Connection) -> datetime | None:
    """Return until when closed invoices have been searched for forgotten charges; None: the book has
    lost nothing.
    """
    row = connection.execute(_SEARCH).one_or_none()
    return None if row is None else row.changed_at


def first_loss(connection: Connection) -> datetime | None:
    """Return the first of the losses that are searched together, or None."""
    query = select(switches.c.changed_at).where(switches.c.name == _FIRST_LOSS)
    return connection.execute(query).scalar()


def end_search(connection: Connection, *, by: str, now: datetime) -> None:
    """Note that a search which was begun at `now` has found nothing more."""
    _mark(connection, _SEARCHED, by=by, reason=None, now=now)


def _mark(
    connection: Connection,
    name: str,
    *,
    by: str,
    reason: str | None,
    now: datetime,
    is_on: bool = True,
) -> None:
    connection.execute(delete(switches).where(switches.c.name == name))
    row = {"name": name, "is_on": is_on, "by": by, "reason": reason, "changed_at": now}
    connection.execute(insert(switches), row)


def await_decisions(connection: Connection, *, by: str, reason: str | None, now: datetime) -> None:
    """Let no period become due until lost decisions are repeated."""
    _mark(connection, _WAITS, by=by, reason=reason, now=now)
    _begin_search(connection, by=by, reason=reason, now=now)


def await_no_more(connection: Connection) -> None:
    """End the wait: all lost decisions are repeated."""
    connection.execute(delete(switches).where(switches.c.name == _WAITS))


def hand_over(connection: Connection, *, by: str, reason: str | None, now: datetime) -> None:
    """Mark this book as continued by another. Repeated, it keeps the first date."""
    if handed_over_at(connection) is None:
        _mark(connection, _HANDED_OVER, by=by, reason=reason, now=now)


def take_back(connection: Connection) -> None:
    """Undo `hand_over`."""
    connection.execute(delete(switches).where(switches.c.name == _HANDED_OVER))


_HANDED_OVER_AT = select(switches.c.changed_at).where(switches.c.name == _HANDED_OVER)


def handed_over_at(connection: Connection) -> datetime | None:
    """Return when another book began to continue this one, or None."""
    return connection.execute(_HANDED_OVER_AT).scalar()


_RESTORED_AT = select(switches.c.changed_at).where(switches.c.name == _RESTORED)


def restored_at(connection: Connection) -> datetime | None:
    """Return when the book was last found to have forgotten something, or None."""
    return connection.execute(_RESTORED_AT).scalar()


_WAITS_SINCE = select(switches.c.changed_at).where(switches.c.name == _WAITS)


def waits_for_decisions(connection: Connection) -> bool:
    """Return whether the book still waits for lost decisions. Until then no period becomes due."""
    return connection.execute(_WAITS_SINCE).scalar() is not None


def pause_service(
    connection: Connection, service: str, *, by: str, reason: str, now: datetime
) -> bool:
    """Stop charges through a service of the gateway. Return False if it is already paused."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    row = {"name": _SERVICE + service, "is_on": False, "by": by, "reason": reason}
    added = connection.execute(
        dialect.insert(switches)
        .values(**row, changed_at=now)
        .on_conflict_do_nothing(index_elements=["name"])
        .returning(switches.c.name)
    )
    return added.first() is not None


def resume_service(connection: Connection, service: str) -> bool:
    """Allow charges through the service again. Return False if it is not paused."""
    gone = connection.execute(delete(switches).where(switches.c.name == _SERVICE + service))
    return gone.rowcount == 1


_SALES_ON = select(switches.c.is_on).where(switches.c.name == SALES)


def sales_are_on(connection: Connection) -> bool:
    """Return whether sales are on. Read in the transaction that submits a charge.

    A missing row counts as off: a database that is not migrated must not charge.
    """
    return bool(connection.execute(_SALES_ON).scalar())


def turn_sales(
    connection: Connection, *, on: bool, by: str, reason: str | None, now: datetime
) -> None:
    """Turn sales on or off. Every read after this commit sees the change.

    A transaction that has read "on" before may still commit afterwards: `wait_for_readers` returns
    when none is left.
    """
    connection.execute(
        update(switches)
        .where(switches.c.name == SALES)
        .values(is_on=on, by=by, reason=reason, changed_at=now)
    )


def wait_for_readers(connection: Connection) -> None:
    """Wait until every transaction that has read the switches has ended.

    Call it in a transaction of its own, after the one that changed the switches. Its lock conflicts
    with every reader, and later readers queue behind it, so a busy night cannot delay it for ever.
    Row locks by the readers can, and cost each charge a write. On SQLite the transaction that
    changed the switches was already alone.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE switches IN ACCESS EXCLUSIVE MODE"))


def ring_again(connection: Connection, service: str | None, now: datetime) -> None:
    """Wake workers for invoices that were put off because sales, or this service, were off."""
    if service is None:
        put_off = invoices.c.reason == SALES_OFF
    else:
        put_off = invoices.c.reason.startswith(service + _PAUSED, autoescape=True)
    connection.execute(
        update(invoices)
        .where(invoices.c.status == "open", invoices.c.enqueue_at > now, put_off)
        .values(enqueue_at=now)
    )
