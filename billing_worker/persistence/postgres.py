"""PostgreSQL connections: every transaction sets what it relies on, and every wait has an end.

Settings at connect are not enough. PgBouncer in transaction mode refuses or drops them, and gives
one client's session to the next. A server, a database and a role have defaults of their own. So
each transaction begins with all settings, in the same round trip as BEGIN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

T = TypeVar("T")

DRIVER: Final = "postgresql+billing"

PINNED: Final = MappingProxyType(
    {
        # Independent of the server's default. With `off`, 168 of 12,113 acknowledged commits were
        # lost in eight crashes, and a lost `submitted` is a double charge.
        "synchronous_commit": "on",
        # A longer query is a bug. An error and the next sweep are better than a blocked worker.
        "statement_timeout": "15000",
        "lock_timeout": "5000",
        "idle_in_transaction_session_timeout": "15000",
    }
)

# A snapshot for the whole transaction shows the kill switch as it was at its beginning: a sale is
# then sent after `sales stop` has returned.
_ISOLATION: Final = "read committed"
_BEGIN: Final = "; ".join(
    [
        f"BEGIN ISOLATION LEVEL {_ISOLATION.upper()}",
        *(f"SET LOCAL {name} = {value}" for name, value in PINNED.items()),
    ]
).encode()

CONNECT: Final = MappingProxyType(
    {
        "autocommit": True,  # This module sends BEGIN itself.
        "connect_timeout": 5,
        # If the server's machine is gone, nothing closes the connection.
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }
)

STATEMENT_SECONDS: Final = 20.0
"""Longer than `statement_timeout`, so that a healthy server reports its error first."""

COMMIT_SECONDS: Final = 10.0
"""Shorter than `statement_timeout`. When that one ends the wait for a synchronous standby,
PostgreSQL reports a commit that the standby does not have.
"""

IDLE_SECONDS: Final = 5.0
"""For BEGIN and for the test of a pooled connection."""


class PatientConnection(psycopg.Connection[Any]):
    """A connection that waits a limited time for each answer, and is closed when the time is over.

    A frozen server, or one with a frozen disk, keeps the connection open and acknowledges every
    packet. Its own timeouts do not run, so only the client can end the wait.
    """

    statement_seconds = 0.0  # deadline of the present transaction
    _ending = False

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        seconds = timeout or self._patience()
        try:
            return super().wait(gen, interval, seconds)
        except psycopg.OperationalError as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            self.close()  # Closed, because its late answer would be read as the answer to the next statement.
            reason = f"the database gave no answer within {seconds:g} s"
            raise psycopg.OperationalError(reason) from error

    def _patience(self) -> float:
        if self._ending:
            return COMMIT_SECONDS
        idle = self.pgconn.transaction_status == TransactionStatus.IDLE
        return IDLE_SECONDS if idle else self.statement_seconds

    def commit(self) -> None:
        with self._ends():
            super().commit()

    def rollback(self) -> None:
        with self._ends():
            super().rollback()

    @contextmanager
    def _ends(self) -> Iterator[None]:
        self._ending = True
        try:
            yield
        finally:
            self._ending = False


class PinnedDialect(PGDialect_psycopg):
    """SQLAlchemy's dialect with its own connect and its own beginning of a transaction."""

    driver = "billing"
    supports_statement_cache = True

    def connect(self, *arguments: Any, **options: Any) -> Any:
        connection = PatientConnection.connect(*arguments, **options)
        connection.statement_seconds = STATEMENT_SECONDS
        return connection

    def do_begin(self, dbapi_connection: Any) -> None:
        connection = dbapi_connection.driver_connection
        connection.statement_seconds = STATEMENT_SECONDS
        connection.execute(_BEGIN, prepare=False)


registry.register("postgresql.billing", __name__, "PinnedDialect")


def allow_slow_statements(connection: Connection, seconds: int) -> None:
    """Allow statements of this length until the end of the transaction."""
    connection.execute(text(f"SET LOCAL statement_timeout = '{seconds}s'"))
    slack = STATEMENT_SECONDS - int(PINNED["statement_timeout"]) / 1000
    connection.connection.driver_connection.statement_seconds = seconds + slack  # type: ignore[union-attr] # ours


def loses_commits(connection: Connection) -> list[str]:
    """Return server settings, in words, that can lose commits and that no client can override."""
    has = _settings(connection, ["fsync", "full_page_writes"])
    return [f"{name} is {value}" for name, value in has.items() if value != "on"]


def _settings(connection: Connection, names: Sequence[str]) -> dict[str, str]:
    query = text("SELECT name, setting FROM pg_settings WHERE name = ANY(:names)")
    rows = connection.execute(query, {"names": list(names)}).all()
    return {row.name: row.setting for row in rows}


def not_pinned(connection: Connection) -> list[str]:
    """Return the settings that this transaction relies on and lacks, in words. Empty if all
    hold.
    """
    wanted = {"transaction_isolation": _ISOLATION, **PINNED}
    has = _settings(connection, list(wanted))
    return [
        f"{name} is {has.get(name, 'unknown')}, not {value}"
        for name, value in wanted.items()
        if has.get(name) != value
    ]
