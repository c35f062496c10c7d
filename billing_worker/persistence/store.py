"""The database connection, and what a transaction is on PostgreSQL and on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from billing_worker.domain.errors import BillingError
from billing_worker.persistence import postgres

_SQLITE_BUSY_SECONDS = 30
_POOL_SIZE = 10
_POOL_OVERFLOW = 10


class CommitUnknown(BillingError):
    """COMMIT raised: the changes are stored or not. Read the rows again."""


AWAY = (CommitUnknown, OperationalError, InterfaceError, PoolTimeoutError)
"""Errors that say that the database did not answer in time. Any other SQLAlchemy error is a bug."""


class Store:
    """Opens transactions. Services pass the connection to the queries of this package.

    PostgreSQL: READ COMMITTED with row locks and commits that wait for the disk, whatever the
    server's defaults are (see `postgres`). SQLite: WAL, `BEGIN IMMEDIATE` (a deferred transaction
    that reads and then writes fails under threads), `synchronous=FULL`.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Commit on a clean exit, roll back on an exception.

        Raises CommitUnknown if COMMIT itself fails. Only then the result is unknown.
        """
        with self.engine.connect() as connection:
            transaction = connection.begin()
            try:
                yield connection
            except BaseException:
                transaction.rollback()
                raise
            try:
                transaction.commit()
            except DBAPIError as error:
                raise CommitUnknown(f"commit failed: {type(error.orig).__name__}") from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection for queries only. On SQLite it never waits for a writer."""
        with self.engine.connect() as connection:
            yield connection.execution_options(sqlite_deferred=True)

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Within(Store):
    """A store inside an open transaction: its own transactions are savepoints.

    A use case that opens its own transaction thereby commits or rolls back together with other
    changes.
    """

    def __init__(self, connection: Connection) -> None:
        self.engine = connection.engine
        self._connection = connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self._connection.begin_nested():
            yield self._connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        yield self._connection

    def close(self) -> None:
        """Does nothing: the engine belongs to the store that opened the transaction."""


def _engine(url: str) -> Engine:
    if url.startswith("sqlite"):
        return _sqlite_engine(url)
    return create_engine(
        make_url(url).set(drivername=postgres.DRIVER),
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        pool_timeout=30,
        pool_use_lifo=True,  # Few connections: each keeps its prepared statements warm.
        pool_pre_ping=True,  # A restart of the server costs a reconnect, not a failed batch.
        connect_args=dict(postgres.CONNECT),
        hide_parameters=True,  # An error message would hold names, e-mails and digests.
    )


def _close_to_others(file: str | None) -> None:
    """Make the file readable for its owner only, or take it from all users of the machine.

    SQLite gives its own files beside it the same rights.
    """
    if not file or file == ":memory:" or file.startswith("file:"):
        return
    path = Path(file)
    with suppress(OSError):  # SQLite says better what is wrong with it
        path.touch(mode=0o600, exist_ok=False)
    with suppress(OSError):
        mode = path.stat().st_mode
        if mode & 0o007:
            path.chmod(mode & ~0o007)


def _sqlite_engine(url: str) -> Engine:
    _close_to_others(make_url(url).database)
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        connect_args={"timeout": _SQLITE_BUSY_SECONDS, "check_same_thread": False},
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def prepare(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # This module sends BEGIN itself.
        dbapi_connection.execute("PRAGMA journal_mode=WAL")
        dbapi_connection.execute("PRAGMA synchronous=FULL")
        dbapi_connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        deferred = connection.get_execution_options().get("sqlite_deferred")
        connection.exec_driver_sql("BEGIN" if deferred else "BEGIN IMMEDIATE")

    return engine
