"""A record of the newest sales that is kept outside of the database.

It shows whether the database has lost data. A database that lacks a recorded sale was restored from
a backup or from a snapshot of its disk. A missing record proves nothing.
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
"""Processes commit and record in different orders. The record is long enough that a late writer
never pushes out a newer sale: each process records one sale at a time.
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
    timeline: int | None = None  # of that server; None: of an older version, which kept none
    server_since: datetime | None = None
    restored_at: datetime | None = None  # when the book was last found to have forgotten something
    machine: str | None = None  # which has the file; None: not known, or kept in Redis
    sales: tuple[Sale, ...] = ()  # in the order of recording

    def with_sale(self, sale: Sale) -> Record:
        return replace(self, sales=(*self.sales, sale)[-MOST_SALES:])

    def missing_in(self, connection: Connection) -> Sale | None:
        """Return the newest recorded sale that the database does not contain, or None."""
        if not self.sales:
            return None
        ids = {sale.attempt_id for sale in self.sales}
        rows = connection.execute(_SUBMITTED, {"row_ids": sorted(ids)})
        known = {Sale(*row) for row in rows}
        return next((sale for sale in reversed(self.sales) if sale not in known), None)


class Memory:
    """A record in this process: for tests and as the default."""

    path: Path | None = None
    machine: str | None = None
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
    """A file beside an SQLite database: `billing.db.outside`. `machine`: see `this_machine`."""

    def __init__(self, database: Path, machine: str | None = None) -> None:
        self.path: Path | None = database
        self.machine = machine
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
        with self._alone():
            known = self.read(record.book)
            self._write(replace(record, sales=known.sales) if known else record)

    def add(self, book: str, sale: Sale) -> None:
        """Add a sale and keep the sales of other processes."""
        with self._alone():
            record = self.read(book)
            if record is not None:
                self._write(record.with_sale(sale))

    def _write(self, record: Record) -> None:
        """Replace the file atomically. A power cut may bring an older version back, which is
        harmless.
        """
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}-{threading.get_ident()}")
        new.write_bytes(written(record))
        new.replace(self._file)
        self.known = record

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the folder, because each write replaces the file itself."""
        folder = os.open(self._file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def database_file(url: str) -> Path | None:
    """Return the file of an SQLite database; None for other databases and for one in memory."""
    parts = make_url(url)
    if parts.get_backend_name() != "sqlite" or not parts.database or parts.database == ":memory:":
        return None
    return Path(parts.database).resolve()


def written(record: Record) -> bytes:
    return json.dumps(asdict(record), default=datetime.isoformat).encode()


def read_record(text: Any) -> Record | None:
    """Return the record, or None if it is missing or unreadable. After a power cut the file may be
    empty.
    """
    try:
        told = json.loads(text)
        sales = [
            (told.pop("attempt_id", None), told.pop("reference_id", None))
        ]  # records written by older versions
        sales = told.get("sales", [sale for sale in sales if sale[0] is not None])
        told["sales"] = tuple(Sale(*sale) for sale in sales)
        for name in ("begun_at", "server_since", "restored_at"):
            told[name] = told.get(name) and datetime.fromisoformat(told[name])
        return Record(**told)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
