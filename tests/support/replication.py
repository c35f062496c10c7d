"""A PostgreSQL primary and its standby, and a fail-over between them that forgets commits.

The standby is asynchronous: a commit is acknowledged before it has left the primary. What the
primary has committed after `cut_off` is lost by `fail_over`, as much or as little as a test likes:

    with ReplicatedPostgres() as pair:
        pair.create_database("books")      # both have it
        pair.cut_off()                     # after everything that was committed until now
        ...                                # committed, acknowledged, and not on the standby
        pair.fail_over()                   # the same address; the past since cut_off is gone
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from psycopg import sql

from tests.support.postgres import EmbeddedPostgres, EmbeddedPostgresError

_CATCHES_UP_WITHIN = 30.0
_POLL_SECONDS = 0.01

_POSITION = sql.SQL("SELECT pg_current_wal_flush_lsn()::text")
_REPLAYED = sql.SQL("SELECT coalesce(pg_last_wal_replay_lsn() >= {}::pg_lsn, false)")
_CUT_OFF = sql.SQL("SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)")
_SOURCE = sql.SQL("SHOW primary_conninfo")
_PROMOTE = sql.SQL("SELECT pg_promote(wait => true)")


class ReplicatedPostgres:
    """One address, `url`, at which the primary answers: the first, and the promoted one after it.

    After a fail-over there is no standby, until `add_standby` copies the new primary.
    """

    def __init__(self) -> None:
        self.primary = EmbeddedPostgres()
        self._standby: EmbeddedPostgres | None = None
        self._source = ""
        self.is_cut_off = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def standby(self) -> EmbeddedPostgres:
        if self._standby is None:
            raise RuntimeError("The standby has become the primary: call add_standby().")
        return self._standby

    def start(self) -> None:
        self.primary.start()
        if self._standby is None:
            self.add_standby()

    def stop(self, *, immediate: bool = False) -> None:
        self.primary.stop(immediate=immediate)

    def restart(self) -> None:
        self.primary.restart()

    def close(self) -> None:
        for server in filter(None, (self._standby, self.primary)):
            server.close()

    def url(self, database: str = "postgres") -> str:
        return self.primary.url(database)

    def create_database(self, name: str, *, template: str = "template1") -> str:
        url = self.primary.create_database(name, template=template)
        self.catch_up()
        return url

    @contextmanager
    def temporary_database(self, *, template: str = "template1") -> Iterator[str]:
        name = f"temporary_{uuid.uuid4().hex}"
        url = self.create_database(name, template=template)
        try:
            yield url
        finally:
            self.primary.drop_database(name)

    def add_standby(self) -> None:
        self._standby = EmbeddedPostgres(copy_of=self.primary)
        self._standby.start()
        self._source = self._standby.execute(_SOURCE)
        self.is_cut_off = False
        self.catch_up()

    def catch_up(self) -> None:
        """Return when the standby has whatever the primary has committed by now."""
        self._until(_REPLAYED.format(self.primary.execute(_POSITION)))

    def cut_off(self) -> None:
        """From now on the standby hears nothing; until now it has heard everything."""
        self.catch_up()
        self.standby.configure(primary_conninfo="")
        self._until(_CUT_OFF)
        self.is_cut_off = True

    def reconnect(self) -> None:
        self.standby.configure(primary_conninfo=self._source)
        self.is_cut_off = False
        self.catch_up()

    def kill_primary(self) -> None:
        """As its clients see it: no answer, and every connection is gone."""
        self.primary.stop(immediate=True)

    def promote(self) -> None:
        """The standby is the primary from now on, on a new timeline, at the primary's address."""
        old, self.primary, self._standby = self.primary, self.standby, None
        self.primary.execute(_PROMOTE)
        port = old.port
        old.close()
        self.primary.move_to(port)

    def fail_over(self) -> None:
        self.kill_primary()
        self.promote()

    def _until(self, question: sql.Composable) -> None:
        deadline = time.monotonic() + _CATCHES_UP_WITHIN
        while not self.standby.execute(question):
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"never true on the standby: {question}")
            time.sleep(_POLL_SECONDS)
