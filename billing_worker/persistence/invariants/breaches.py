"""What is broken now and when each invariant was last asked about."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.schema.tables import breaches, invariant_runs


@dataclass(frozen=True, slots=True)
class Run:
    ran_at: datetime
    next_id: int
    """Where the next run goes on; 0: from the beginning."""


def runs(connection: Connection) -> dict[str, Run]:
    """Return the last run by invariant."""
    rows = connection.execute(select(invariant_runs))
    return {row.invariant: Run(row.ran_at, row.next_id) for row in rows}


def record_run(connection: Connection, invariant: str, run: Run) -> None:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    values = {"ran_at": run.ran_at, "next_id": run.next_id}
    statement = dialect.insert(invariant_runs).values(invariant=invariant, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["invariant"], set_=values))


def known(connection: Connection) -> dict[str, list[int]]:
    """Return by invariant the ids of the rows that were found to break it."""
    found: dict[str, list[int]] = {}
    for row in connection.execute(select(breaches.c.invariant, breaches.c.row_id)):
        found.setdefault(row.invariant, []).append(row.row_id)
    return found


def counts(connection: Connection) -> dict[str, int]:
    query = select(breaches.c.invariant, func.count().label("rows")).group_by(breaches.c.invariant)
    return {row.invariant: row.rows for row in connection.execute(query)}


def add(
    connection: Connection, invariant: str, found: Mapping[int, str], now: datetime
) -> list[str]:
    """Record (row id: reference). Return the references of those that nobody had recorded."""
    if not found:
        return []
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    rows = [
        {"invariant": invariant, "row_id": row_id, "reference": reference, "found_at": now}
        for row_id, reference in found.items()
    ]
    added = connection.execute(
        dialect.insert(breaches)
        .values(rows)
        .on_conflict_do_nothing()
        .returning(breaches.c.reference)
    )
    return sorted(added.scalars())


def remove(connection: Connection, invariant: str, row_ids: Collection[int]) -> None:
    """Forget what is mended, so that it is told of when it breaks again."""
    if row_ids:
        connection.execute(
            delete(breaches).where(
                breaches.c.invariant == invariant, breaches.c.row_id.in_(sorted(row_ids))
            )
        )
