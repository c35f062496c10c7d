"""What is known of a book outside of its database, to notice that the database has forgotten.

A record names the newest sale that was committed. A database that has no such sale has lost it:
it was restored from a backup, or from a snapshot of its disk. A record that is gone proves nothing.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, make_url, select

from billing_worker.persistence.schema.tables import attempts

_SUBMITTED = select(attempts.c.reference_id).where(
    attempts.c.id == bindparam("row_id"), attempts.c.submitted_at.is_not(None)
)


@dataclass(frozen=True, slots=True)
class Record:
    book: str
    begun_at: datetime
    """Every sale since then was recorded: the record was neither lost nor begun again."""
    server: str | None = None
    server_since: datetime | None = None
    attempt_id: int | None = None
    reference_id: str | None = None

    def is_in(self, connection: Connection) -> bool:
        """Whether the database knows the sale that is recorded."""
        if self.attempt_id is None:
            return True
        known = connection.execute(_SUBMITTED, {"row_id": self.attempt_id}).scalar()
        return known == self.reference_id


class Memory:
    """A record in this process: for tests, and where nothing else is given."""

    path: Path | None = None
    is_missing = False

    def __init__(self) -> None:
        self.known: Record | None = None

    def read(self) -> Record | None:
        return self.known

    def write(self, record: Record) -> None:
        self.known = record


class FileRecord:
    """A file beside an SQLite database: `billing.db.outside`."""

    def __init__(self, database: Path) -> None:
        self.path: Path | None = database
        self._file = database.with_name(database.name + ".outside")
        self.known: Record | None = None

    @property
    def is_missing(self) -> bool:
        return not self._file.exists()

    def read(self) -> Record | None:
        try:
            self.known = read_record(self._file.read_bytes())
        except FileNotFoundError:
            self.known = None
        return self.known

    def write(self, record: Record) -> None:
        """Whole, or not at all. A power cut may bring an older one back, which is harmless."""
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}-{threading.get_ident()}")
        new.write_bytes(written(record))
        new.replace(self._file)
        self.known = record


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
        for name in ("begun_at", "server_since"):
            told[name] = told[name] and datetime.fromisoformat(told[name])
        return Record(**told)
    except (TypeError, ValueError, KeyError):
        return None
