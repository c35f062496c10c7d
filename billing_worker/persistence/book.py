"""Which book this database holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, select

from billing_worker.persistence.tables import book


@dataclass(frozen=True, slots=True)
class Book:
    """The one row of its table, made by the migration."""

    identity: str  # random; copied with the database, so a clone and a restored backup share it
    prefix: str  # of new references at the gateway; empty for a book older than prefixes
    made_at: datetime
    test_mode: bool | None  # None: nothing was charged yet


_BOOK = select(book.c.identity, book.c.prefix, book.c.made_at, book.c.test_mode)


IDENTITY = select(book.c.identity).scalar_subquery().label("book")
"""For queries that need nothing else of it: a column costs less than a query of its own."""


def read(connection: Connection) -> Book:
    row = connection.execute(_BOOK).one()
    return Book(row.identity, row.prefix, row.made_at, row.test_mode)
