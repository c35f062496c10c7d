"""Many rows at once, with their ids in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Table, func, insert, select, text


def insert_rows(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Insert rows with ids that are taken beforehand, and return those.

    RETURNING in the order of the rows needs one statement with every value in it, which psycopg
    parses anew each time: an import spent a third of its time there.
    """
    ids = _take_ids(connection, table, len(rows))
    if rows:
        numbered = [row | {"id": row_id} for row, row_id in zip(rows, ids, strict=True)]
        connection.execute(insert(table), numbered)
    return ids


def _take_ids(connection: Connection, table: Table, count: int) -> list[int]:
    if connection.dialect.name == "postgresql":
        taken = text(
            "SELECT nextval(pg_get_serial_sequence(:table, 'id')) FROM generate_series(1, :n)"
        )
        return list(connection.execute(taken, {"table": table.name, "n": count}).scalars())
    # `BEGIN IMMEDIATE`: nobody else writes before we commit.
    newest = connection.execute(select(func.max(table.c.id))).scalar() or 0
    return list(range(newest + 1, newest + 1 + count))
