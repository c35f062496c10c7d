"""Which book this database holds, and which database server holds it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Row,
    Text,
    literal_column,
    null,
    select,
    text,
    update,
)
from sqlalchemy.exc import NotSupportedError, ProgrammingError

from billing_worker.persistence.schema.columns import Instant
from billing_worker.persistence.schema.tables import book


@dataclass(frozen=True, slots=True)
class Server:
    """The database server.

    `identity`: PostgreSQL's system identifier and the OID of the database. A standby has the same
    identity; a dump that is loaded elsewhere has another. For SQLite it is the path of the file.

    `timeline`: PostgreSQL increases it when a standby is promoted or a backup is recovered. 0 for
    SQLite.
    """

    identity: str
    timeline: int = 0


@dataclass(frozen=True, slots=True)
class Book:
    """The only row of its table. The migration creates it."""

    identity: str  # random; a clone or a restored backup has the same
    prefix: str  # prefix of new references at the gateway; empty for books older than prefixes
    made_at: datetime
    test_mode: bool | None  # mode of all charges; None before the first one
    server: Server | None = None  # server of the last claim; None before the first one
    server_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class ServerNow:
    """What the database server reports about itself now. SQLite reports `newest_entry` alone."""

    server: Server | None = None  # None: the database role may not read it
    clock: datetime | None = None
    synchronous_commit: str | None = None
    synchronous_standby_names: str | None = None
    newest_entry: datetime | None = None
    """The latest time among the last entries of the history, where the server has no clock."""

    @property
    def is_hidden(self) -> bool:
        """PostgreSQL, and this role may not read which server it is: a fail-over is not noticed."""
        return self.clock is not None and self.server is None


BOOK_COLUMNS = tuple(column.label(f"book_{column.name}") for column in book.c)

_SYSTEM = "(SELECT system_identifier FROM pg_control_system())"
_DATABASE = "(SELECT oid::bigint FROM pg_database WHERE datname = current_database())"
# Not from pg_control_checkpoint(): after a promotion it shows the old timeline until the next
# checkpoint.
_TIMELINE = "(SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))"

_SERVER = text(f"SELECT {_SYSTEM}, {_DATABASE}, {_TIMELINE}")
_MAY_READ_SERVER = "billing_worker.may_read_server"


def server_columns(connection: Connection) -> tuple[ColumnElement[Any], ...]:
    """Return the columns that identify the server.

    A transaction that depends on the server selects them itself: a connection pooler may have
    switched servers since the last transaction.
    """
    if connection.dialect.name != "postgresql":
        return _NOTHING
    return _ALL if _may_read_server(connection) else _UNREADABLE


_SETTINGS: tuple[ColumnElement[Any], ...] = (
    literal_column("clock_timestamp()", Instant).label("server_clock"),
    literal_column("current_setting('synchronous_commit')", Text).label("synchronous_commit"),
    literal_column("current_setting('synchronous_standby_names')", Text).label("standby_names"),
)
_ALL: tuple[ColumnElement[Any], ...] = (
    literal_column(_SYSTEM, BigInteger).label("system_identifier"),
    literal_column(_DATABASE, BigInteger).label("database_oid"),
    literal_column(_TIMELINE, Text).label("timeline"),
    *_SETTINGS,
    null().label("newest_entry"),
)
_UNREADABLE: tuple[ColumnElement[Any], ...] = (
    *(null().label(name) for name in ("system_identifier", "database_oid", "timeline")),
    *_SETTINGS,
    null().label("newest_entry"),
)
# Entries before a person's `sales start` do not count: it says that the clock is right now.
_NEWEST = """(WITH last AS (SELECT at, id, kind FROM events ORDER BY id DESC LIMIT 8)
SELECT max(at) FROM last
WHERE id >= coalesce((SELECT max(id) FROM last WHERE kind = 'sales.switched'), 0))"""
_NOTHING: tuple[ColumnElement[Any], ...] = (
    *(null().label(column.name) for column in _ALL[:-1]),
    literal_column(_NEWEST, Instant).label("newest_entry"),
)


def _may_read_server(connection: Connection) -> bool:
    """Return whether this role may read the server's identity. Asked once for each connection.

    PostgreSQL allows it to every role; a hosted one may not. A standby that is not promoted yet
    raises OperationalError.
    """
    known: bool | None = connection.info.get(_MAY_READ_SERVER)
    if known is None:
        try:
            with connection.begin_nested():
                connection.execute(_SERVER)
        except (ProgrammingError, NotSupportedError):
            known = False
        else:
            known = True
        connection.info[_MAY_READ_SERVER] = known
    return known


def book_from(row: Row[Any]) -> Book:
    """Build a book from a row with BOOK_COLUMNS."""
    server = None if row.book_server is None else Server(row.book_server, row.book_timeline)
    return Book(
        row.book_identity,
        row.book_prefix,
        row.book_made_at,
        row.book_test_mode,
        server,
        row.book_server_since,
    )


def server_from(row: Row[Any]) -> ServerNow:
    """Build the server's report from a row with `server_columns`."""
    server = None
    if row.system_identifier is not None:
        # A WAL file name begins with the timeline as 8 hexadecimal digits.
        identity = f"{row.system_identifier}/{row.database_oid}"
        server = Server(identity, int(row.timeline, 16))
    return ServerNow(
        server,
        row.server_clock,
        row.synchronous_commit,
        row.standby_names,
        row.newest_entry,
    )


_BOOK = select(*BOOK_COLUMNS)


IDENTITY = select(book.c.identity).scalar_subquery().label("book")
BOOK_PREFIX = select(book.c.prefix).scalar_subquery().label("book_prefix")
"""Columns for other queries: cheaper than a query of its own."""


def identity(connection: Connection) -> str | None:
    """Return the identity, or None if the database is not migrated."""
    return connection.execute(select(book.c.identity)).scalar()


def read(connection: Connection) -> Book:
    return book_from(connection.execute(_BOOK).one())


def lock(connection: Connection) -> tuple[Book, ServerNow]:
    """Lock the book and return it with the server's report."""
    query = select(*BOOK_COLUMNS, *server_columns(connection)).with_for_update(of=book)
    row = connection.execute(query).one()
    return book_from(row), server_from(row)


def remember_server(connection: Connection, server: Server, now: datetime) -> None:
    connection.execute(
        update(book).values(server=server.identity, timeline=server.timeline, server_since=now)
    )


SAID_AGAIN_WITHIN = timedelta(days=31)
"""How long after a loss or a move a service may repeat a command that this book does not know."""


@dataclass(frozen=True, slots=True)
class Other:
    """A book on the same gateway account."""

    identity: str
    prefix: str  # of its references at the gateway


def remember_other(connection: Connection, other: Other, now: datetime) -> None:
    """Write that this book was taken back from `other`, which may know commands that it does not."""
    connection.execute(
        update(book).values(taken_back_at=now, other_book=other.identity, other_prefix=other.prefix)
    )


def may_have_begun_in(connection: Connection, now: datetime) -> Other | None:
    """Return the book in which a new charge or subscription may already exist, if there is one."""
    row = connection.execute(select(book.c.taken_back_at, book.c.other_book, book.c.other_prefix))
    taken_back_at, identity, prefix = row.one()
    if taken_back_at is None or now > taken_back_at + SAID_AGAIN_WITHIN:
        return None
    return Other(identity, prefix)


def set_mode(connection: Connection, *, test_mode: bool) -> bool:
    """Write the mode of the first charge. Return False if the book already has the other mode."""
    written = connection.execute(
        update(book)
        .where(book.c.test_mode.is_(None) | (book.c.test_mode == test_mode))
        .values(test_mode=test_mode)
    )
    return written.rowcount == 1
