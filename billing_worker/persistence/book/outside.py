"""What is known of a book outside of its database, to notice that the database has forgotten.

A record names the newest sales that were committed. A database that lacks one of them has lost it:
it was restored from a backup, or from a snapshot of its disk. A record that is gone proves nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, make_url, select

from billing_worker.persistence.schema.tables import attempts

if sys.platform != "win32":  # which lacks it, and shall get as far as the clear error
    import fcntl

MOST_SALES = 64
"""Processes record in another order than they commit: a sale must not be pushed out by those that
were committed before it. A process records one at a time, and so many nobody runs.
"""

_SUBMITTED = select(attempts.c.id, attempts.c.reference_id).where(
    attempts.c.id.in_(bindparam("row_ids", expanding=True)), attempts.c.submitted_at.is_not(None)
)


class Sale(NamedTuple):
    attempt_id: int
    reference_id: str


@dataclass(frozen=True, slots=True)
class Record:
    book: str
    begun_at: datetime | None
    """Every sale since then was recorded: the record was neither lost nor begun again. None: this
    process could not record one, so it is not known of any time."""
    server: str | None = None
    server_since: datetime | None = None
    sales: tuple[Sale, ...] = ()  # in the order in which they were recorded

    def with_sale(self, sale: Sale) -> Record:
        return replace(self, sales=(*self.sales, sale)[-MOST_SALES:])

    def missing_in(self, connection: Connection) -> Sale | None:
        """The newest recorded sale that the database does not know."""
        if not self.sales:
            return None
        ids = {sale.attempt_id for sale in self.sales}
        rows = connection.execute(_SUBMITTED, {"row_ids": sorted(ids)})
        known = {Sale(*row) for row in rows}
        return next((sale for sale in reversed(self.sales) if sale not in known), None)


class Memory:
    """A record in this process: for tests, and where nothing else is given."""

    path: Path | None = None
    is_missing = False

    def __init__(self) -> None:
        self.known: Record | None = None

    def read(self, _book: str) -> Record | None:
        return self.known

    def begin(self, record: Record) -> None:
        self.known = record

    def renew(self, record: Record) -> None:
        self.known = record

    def add(self, _book: str, sale: Sale) -> None:
        if self.known is not None:
            self.known = self.known.with_sale(sale)


class FileRecord:
    """A file beside an SQLite database: `billing.db.outside`."""

    def __init__(self, database: Path) -> None:
        self.path: Path | None = database
        self._file = database.with_name(database.name + ".outside")
        self.known: Record | None = None

    @property
    def is_missing(self) -> bool:
        return not self._file.exists()

    def read(self, _book: str) -> Record | None:
        try:
            self.known = read_record(self._file.read_bytes())
        except FileNotFoundError:
            self.known = None
        return self.known

    def begin(self, record: Record) -> None:
        with self._alone():
            self._write(record)

    def renew(self, record: Record) -> None:
        """Never needed: a file that cannot be written raises, and the sale is not sent."""

    def add(self, book: str, sale: Sale) -> None:
        """What other processes have added meanwhile is kept."""
        with self._alone():
            record = self.read(book)
            if record is not None:
                self._write(record.with_sale(sale))

    def _write(self, record: Record) -> None:
        """Whole, or not at all. A power cut may bring an older one back, which is harmless."""
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}-{threading.get_ident()}")
        new.write_bytes(written(record))
        new.replace(self._file)
        self.known = record

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The folder is locked: the file itself is another one after each write."""
        folder = os.open(self._file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def database_file(url: str) -> Path | None:
    """The file of an SQLite database; None for any other, and for one in memory."""
    parts = make_url(url)
    if parts.get_backend_name() != "sqlite" or not parts.database or parts.database == ":memory:":
        return None
    return Path(parts.database).resolve()


def written(record: Record) -> bytes:
    return json.dumps(asdict(record), default=datetime.isoformat).encode()


def read_record(text: Any) -> Record | None:
    """None also for what nobody can read: after a power cut a file may be empty."""
    try:
        told = json.loads(text)
        sales = [
            (told.pop("attempt_id", None), told.pop("reference_id", None))
        ]  # of older versions
        sales = told.get("sales", [sale for sale in sales if sale[0] is not None])
        told["sales"] = tuple(Sale(*sale) for sale in sales)
        for name in ("begun_at", "server_since"):
            told[name] = told[name] and datetime.fromisoformat(told[name])
        return Record(**told)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
