from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
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
_WAITS = "decisions"
_HANDED_OVER = "handed_over"
_SAID_AGAIN_WITHIN = timedelta(days=31)

WAITS = (
    "these books are from a backup and wait for the decisions that they have forgotten: "
    "start sales with --restored when all of them have been said again"
)

SALES_OFF = "sales are switched off"
_PAUSED = " is paused: "


@dataclass(frozen=True, slots=True)
class Switches:
    """What may be sold at all: the kill switch, and why which services of the gateway rest."""

    sales_on: bool
    paused: dict[str, str]
    restored_at: datetime | None = None
    """When it was last said, or noticed, that these books have forgotten something."""

    book: Book | None = None
    server: ServerNow = field(default_factory=ServerNow)
    """What the database server said of itself in the same query."""

    waits_since: datetime | None = None
    """When the book began to wait for the decisions that it has forgotten. Sales are off then."""

    @property
    def have_forgotten(self) -> bool:
        """Whether these books are from a backup."""
        return self.restored_at is not None or self.waits_since is not None

    def may_be_forgotten(self, invoice: Invoice) -> bool:
        """Whether these books' life before they were restored may have charged for the invoice.

        One period more than that life has seen, because what is said again (a pause with its
        resumption) may give a period another date than it had then; and any first period for a
        month, as a command that is sent again opens it when it comes.
        """
        if self.waits_since is not None:
            return True
        if self.restored_at is None:
            return False
        said_again = invoice.period_number == 0 and invoice.period_start <= (
            self.restored_at + _SAID_AGAIN_WITHIN
        )
        return is_near(invoice, self.restored_at) or said_again

    def obstacle(self, service: str) -> str | None:
        """What stands against a sale through this service."""
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
    return select(*_COLUMNS, *books.COLUMNS, *of_the_server).select_from(with_book)


def read(connection: Connection) -> Switches:
    """One query for all. A missing sales row counts as off, as in `sales_are_on`.

    Book and server are in it too, so that no charge is submitted on a server that has forgotten
    what another one knew.
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


def mark_restored(connection: Connection, *, by: str, reason: str | None, now: datetime) -> None:
    """After a loss, whatever is due by now may have been charged in the time that was forgotten."""
    _mark(connection, _RESTORED, by=by, reason=reason, now=now)


def _mark(connection: Connection, name: str, *, by: str, reason: str | None, now: datetime) -> None:
    connection.execute(delete(switches).where(switches.c.name == name))
    row = {"name": name, "is_on": True, "by": by, "reason": reason, "changed_at": now}
    connection.execute(insert(switches), row)


def await_decisions(connection: Connection, *, by: str, reason: str | None, now: datetime) -> None:
    """Let nothing become due: decisions that the book has forgotten are about to be said again."""
    _mark(connection, _WAITS, by=by, reason=reason, now=now)


def await_no_more(connection: Connection) -> None:
    """All forgotten decisions have been said again."""
    connection.execute(delete(switches).where(switches.c.name == _WAITS))


def hand_over(connection: Connection, *, by: str, reason: str | None, now: datetime) -> None:
    """Another book goes on with this one. Said again, it keeps its first time."""
    if handed_over_at(connection) is None:
        _mark(connection, _HANDED_OVER, by=by, reason=reason, now=now)


def take_back(connection: Connection) -> None:
    """No other book goes on with this one."""
    connection.execute(delete(switches).where(switches.c.name == _HANDED_OVER))


_HANDED_OVER_AT = select(switches.c.changed_at).where(switches.c.name == _HANDED_OVER)


def handed_over_at(connection: Connection) -> datetime | None:
    """When another book began to go on with this one; None: none has."""
    return connection.execute(_HANDED_OVER_AT).scalar()


_WAITS_SINCE = select(switches.c.changed_at).where(switches.c.name == _WAITS)


def waits_for_decisions(connection: Connection) -> bool:
    """Whether forgotten decisions are still to be said again. Until then nothing becomes due."""
    return connection.execute(_WAITS_SINCE).scalar() is not None


def pause_service(
    connection: Connection, service: str, *, by: str, reason: str, now: datetime
) -> bool:
    """Stop charging through a service of the gateway. False: it was paused already."""
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
    """Charge through it again. False: it was not paused."""
    gone = connection.execute(delete(switches).where(switches.c.name == _SERVICE + service))
    return gone.rowcount == 1


_SALES_ON = select(switches.c.is_on).where(switches.c.name == SALES)


def sales_are_on(connection: Connection) -> bool:
    """The kill switch, read inside the transaction that arms a charge.

    A missing row counts as off: a database that nobody has migrated must not charge.
    """
    return bool(connection.execute(_SALES_ON).scalar())


def turn_sales(
    connection: Connection, *, on: bool, by: str, reason: str | None, now: datetime
) -> None:
    """Whoever reads the switch after this commit sees it. A transaction that has read "on" before
    may still commit afterwards: `wait_for_readers` returns when there is none left.
    """
    connection.execute(
        update(switches)
        .where(switches.c.name == SALES)
        .values(is_on=on, by=by, reason=reason, changed_at=now)
    )


def wait_for_readers(connection: Connection) -> None:
    """Return when every transaction that has read the switches before has ended.

    Call it in a transaction of its own, after the one that turned them. The lock conflicts with
    every reader, and those who come later queue behind it, so a busy night cannot keep it waiting;
    row locks taken by the readers could, and would cost each charge a write. On SQLite the
    transaction that turned them was already alone with the database.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE switches IN ACCESS EXCLUSIVE MODE"))


def ring_again(connection: Connection, service: str | None, now: datetime) -> None:
    """Ring for what was put off because sales, or this service, were off."""
    if service is None:
        put_off = invoices.c.reason == SALES_OFF
    else:
        put_off = invoices.c.reason.startswith(service + _PAUSED, autoescape=True)
    connection.execute(
        update(invoices)
        .where(invoices.c.status == "open", invoices.c.enqueue_at > now, put_off)
        .values(enqueue_at=now)
    )
