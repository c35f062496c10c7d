"""Counters."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.schema.tables import counters


def add(connection: Connection, name: str, number: int, now: datetime) -> None:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(counters).values(name=name, total=number, changed_at=now)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name"],
            set_={"total": counters.c.total + number, "changed_at": now},
        )
    )


def add_unless_recent(connection: Connection, name: str, now: datetime, since: datetime) -> bool:
    """Count unless it was counted after `since`. Return whether it was counted now."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(counters).values(name=name, total=1, changed_at=now)
    counted = connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name"],
            set_={"total": counters.c.total + 1, "changed_at": now},
            where=counters.c.changed_at <= since,
        ).returning(counters.c.name)
    )
    return counted.first() is not None


def last_counted(connection: Connection, name: str) -> datetime | None:
    """Return when it was last counted, or None."""
    query = select(counters.c.changed_at).where(counters.c.name == name)
    at: datetime | None = connection.execute(query).scalar()
    return at


def counts(connection: Connection, prefix: str) -> dict[str, int]:
    """Return counts by name, without the prefix."""
    query = select(counters.c.name, counters.c.total).where(
        counters.c.name.startswith(prefix, autoescape=True)
    )
    return {row.name.removeprefix(prefix): row.total for row in connection.execute(query)}
