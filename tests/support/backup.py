"""A copy of the books, and the books as they were then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, insert, select, text

from billing_worker.persistence.schema.tables import metadata
from billing_worker.persistence.store import Store

Backup = dict[str, list[dict[str, Any]]]


def backup(store: Store) -> Backup:
    with store.reading() as connection:
        return {
            table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for table in metadata.sorted_tables
        }


def restore(store: Store, kept: Backup) -> None:
    with store.transaction() as connection, _no_triggers(connection):
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
        for table in metadata.sorted_tables:
            if rows := kept[table.name]:
                connection.execute(insert(table), rows)
        if connection.dialect.name == "postgresql":
            _number_on(connection)


def _number_on(connection: Connection) -> None:
    """A backup holds the sequences too: what was numbered after it is numbered once more."""
    for table in metadata.sorted_tables:
        if "id" in table.c:
            newest = f"SELECT max(id) FROM {table.name}"  # noqa: S608 - our own names
            sequence = f"pg_get_serial_sequence('{table.name}', 'id')"
            connection.execute(
                text(f"SELECT setval({sequence}, greatest(({newest}), 1), ({newest}) IS NOT NULL)")
            )


@contextmanager
def _no_triggers(connection: Connection) -> Iterator[None]:
    """History refuses to be deleted; whoever restores a database is not asked by its triggers."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        yield
        return
    query = text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    triggers = connection.execute(query).all()
    for trigger in triggers:
        connection.execute(text(f"DROP TRIGGER {trigger.name}"))
    yield
    for trigger in triggers:
        connection.exec_driver_sql(trigger.sql)
