"""One store that is lent to one test after the other, each with a database of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event, make_url

from billing_worker.persistence.store import Store


class Lent:
    """A store that is built as ever, but connects to the database of whoever has it now.

    SQLAlchemy keeps what it has compiled with the engine: an engine for each of thousands of tests
    would compile every statement thousands of times.
    """

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        self._database = ""
        event.listen(self.store.engine, "do_connect", self._choose_database)
        if self.store.is_sqlite:
            event.listen(self.store.engine, "connect", _need_not_survive_a_power_cut)

    @contextmanager
    def for_database(self, url: str) -> Iterator[Store]:
        database = make_url(url).database
        assert database
        self._database = database
        try:
            yield self.store
        finally:
            # monkeypatch leaves the method that it has put back on the instance: it would hide what
            # the next test does to the class.
            self.store.__dict__.pop("transaction", None)
            self.store.__dict__.pop("reading", None)
            self.store.close()

    def _choose_database(
        self, dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]
    ) -> None:
        if dialect.name == "sqlite":
            arguments[:] = [self._database]
        else:
            options["dbname"] = self._database


def _need_not_survive_a_power_cut(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")
