"""When each periodic sweep last finished."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.schema.tables import sweep_runs


def add(connection: Connection, sweep: str, now: datetime) -> None:
    """Record that the sweep has finished. A later time of another worker stands."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(sweep_runs).values(sweep=sweep, finished_at=now)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["sweep"],
            set_={"finished_at": now},
            where=sweep_runs.c.finished_at < now,
        )
    )


def last(connection: Connection) -> dict[str, datetime]:
    """Return by sweep when it last finished."""
    return {row.sweep: row.finished_at for row in connection.execute(select(sweep_runs))}


def newest(connection: Connection) -> datetime | None:
    """Return when any sweep last finished, or None if none ever has."""
    finished: datetime | None = connection.execute(
        select(func.max(sweep_runs.c.finished_at))
    ).scalar()
    return finished
