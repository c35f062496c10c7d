"""Which book this database holds, and which database server holds it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
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

from billing_worker.persistence.schema.tables import Instant, book


@dataclass(frozen=True, slots=True)
class Server:
    """What holds a database.

    `identity`: PostgreSQL's system identifier and the OID of the database; a standby has the same,
    a dump that is loaded elsewhere has others. For SQLite the path of the file.
    `timeline`: PostgreSQL counts it up whenever a standby is promoted or a backup recovered; else 0.
    """

    identity: str
    timeline: int = 0


@dataclass(frozen=True, slots=True)
class Book:
    """The one row of its table, made by the migration."""

    identity: str  # random; copied with the database, so a clone and a restored backup share it
    prefix: str  # of new references at the gateway; empty for a book older than prefixes
    made_at: datetime
    test_mode: bool | None  # None: nothing was charged yet
    server: Server | None = None  # where it was charged from last; None: nothing was claimed yet
    server_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class ServerNow:
    """What the database server says of itself at this moment. SQLite says nothing."""

    server: Server | None = None  # None: this role may not read it
    clock: datetime | None = None
    synchronous_commit: str | None = None
    synchronous_standby_names: str | None = None


COLUMNS = tuple(column.label(f"book_{column.name}") for column in book.c)

_SYSTEM = "(SELECT system_identifier FROM pg_control_system())"
_DATABASE = "(SELECT oid::bigint FROM pg_database WHERE datname = current_database())"
# Not from pg_control_checkpoint(): after a promotion that is the old one until the next checkpoint.
_TIMELINE = "(SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))"

_SERVER = text(f"SELECT {_SYSTEM}, {_DATABASE}, {_TIMELINE}")
_MAY_READ_SERVER = "billing_worker.may_read_server"


def server_columns(connection: Connection) -> tuple[ColumnElement[Any], ...]:
    """To be selected in whatever transaction must know on which server it runs: a pooler between us
    may have changed it since the last one.
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
)
_UNREADABLE: tuple[ColumnElement[Any], ...] = (
    *(null().label(name) for name in ("system_identifier", "database_oid", "timeline")),
    *_SETTINGS,
)
_NOTHING: tuple[ColumnElement[Any], ...] = tuple(null().label(column.name) for column in _ALL)


def _may_read_server(connection: Connection) -> bool:
    """Asked once for each connection. PostgreSQL lets every role read it; a hosted one may not.

    A standby that is not promoted yet raises OperationalError, which is no answer.
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
    """`row` has COLUMNS."""
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
    """`row` has `server_columns`."""
    server = None
    if row.system_identifier is not None:
        # PostgreSQL shows it as signed; 8 hexadecimal digits are the timeline's in a file's name.
        identity = f"{row.system_identifier}/{row.database_oid}"
        server = Server(identity, int(row.timeline, 16))
    return ServerNow(server, row.server_clock, row.synchronous_commit, row.standby_names)


_BOOK = select(*COLUMNS)


IDENTITY = select(book.c.identity).scalar_subquery().label("book")
"""For queries that need nothing else of it: a column costs less than a query of its own."""


def identity(connection: Connection) -> str | None:
    """None: nobody has migrated this database."""
    return connection.execute(select(book.c.identity)).scalar()


def read(connection: Connection) -> Book:
    return book_from(connection.execute(_BOOK).one())


def lock(connection: Connection) -> tuple[Book, ServerNow]:
    """The book, for whoever is about to change it."""
    query = select(*COLUMNS, *server_columns(connection)).with_for_update(of=book)
    row = connection.execute(query).one()
    return book_from(row), server_from(row)


def remember_server(connection: Connection, server: Server, now: datetime) -> None:
    connection.execute(
        update(book).values(server=server.identity, timeline=server.timeline, server_since=now)
    )


def set_mode(connection: Connection, *, test_mode: bool) -> bool:
    """Write the mode of the first charge, which is the mode of all. False: another one was first."""
    written = connection.execute(
        update(book)
        .where(book.c.test_mode.is_(None) | (book.c.test_mode == test_mode))
        .values(test_mode=test_mode)
    )
    return written.rowcount == 1
