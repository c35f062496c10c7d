"""A database that costs microseconds: SQLite in memory, copied and put back as bytes."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import StaticPool

from billing_worker.persistence.store import CommitUnknown, Store


class MemoryStore(Store):
    """SQLite in memory, with a boundary before each transaction and after each commit."""

    def __init__(
        self,
        template: bytes,
        boundary: Callable[[str], None],
        doom: Callable[[], str],
        number: int = 0,
    ) -> None:
        self._memory, self._connection = _memory(number)
        self._memory.deserialize(template)
        self._boundary = boundary
        self._doom = doom
        self.commits = 0
        self._before: deque[bytes] = deque(maxlen=0)

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        self._boundary("begin")
        before = self.copy() if self._before.maxlen else b""
        self._memory.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._memory.execute("ROLLBACK")
            raise
        fate = self._doom()
        self._memory.execute("ROLLBACK" if fate == "lost" else "COMMIT")
        if fate != "lost":
            self.commits += 1
            self._before.append(before)
        if fate:
            raise CommitUnknown(f"the connection broke during COMMIT; it was {fate}")
        self._boundary("committed")

    @contextmanager
    def reading(self) -> Iterator[Any]:
        yield self._connection

    def copy(self) -> bytes:
        return self._memory.serialize()

    def replace(self, kept: bytes) -> None:
        self._memory.deserialize(kept)

    def remember(self, commits: int) -> None:
        """From now on, so many of the last commits can be forgotten."""
        self._before = deque(maxlen=commits)

    def forget(self, commits: int) -> int:
        """The database is as it was so many commits ago. Returns how many it has forgotten."""
        commits = min(commits, len(self._before))
        for _ in range(commits):
            kept = self._before.pop()
        if commits:
            self.replace(kept)
            self.commits -= commits
        return commits

    def close(self) -> None:
        """The next simulation uses the same connection: its compiled statements are worth it."""


@cache
def _memory(_number: int) -> tuple[sqlite3.Connection, Connection]:
    """One database in memory per process and book, filled anew for each run.

    SQLAlchemy's view of it is one connection that is never given back: BEGIN and COMMIT are said
    below it, because a third of a run was SQLAlchemy beginning and ending transactions.
    """
    memory = sqlite3.connect(
        ":memory:", check_same_thread=False, isolation_level=None, cached_statements=1_000
    )
    engine = create_engine("sqlite://", creator=lambda: memory, poolclass=StaticPool)
    return memory, engine.connect()


def template_bytes(path: Path) -> bytes:
    """A migrated, empty database as bytes: opening it costs a copy."""
    source = sqlite3.connect(path)
    try:
        content = bytearray(source.serialize())
    finally:
        source.close()
    content[18:20] = b"\x01\x01"  # A database in memory cannot be in WAL mode, which is said here.
    return bytes(content)
