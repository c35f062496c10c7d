"""Inserts of many rows with ids in their order, and IN conditions with many values."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    ColumnElement,
    Connection,
    Insert,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    column,
    func,
    insert,
    select,
    text,
)


def insert_rows(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Insert rows and return their ids in order. The ids are taken before the insert.

    RETURNING keeps the order only in one statement with all values, which psycopg parses anew each
    time: an import spent a third of its time there.
    """
    ids = _take_ids(connection, table, len(rows))
    numbered = [row | {"id": row_id} for row, row_id in zip(rows, ids, strict=True)]
    insert_many(connection, table, numbered)
    return ids


def insert_many(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that all have the same columns, in their order.

    PostgreSQL takes them as one JSON text. Binding and executing them one by one costs server and
    client more than twice the CPU time.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        given = json.dumps(rows, default=_as_text)
        connection.execute(_from_json(table, tuple(rows[0])), {"rows": given})
    else:
        connection.execute(insert(table), rows)


@cache
def _from_json(table: Table, names: tuple[str, ...]) -> Insert:
    columns = [column(name, table.c[name].type) for name in names]
    given = func.json_to_recordset(cast(bindparam("rows", type_=Text), JSON))
    rows = given.table_valued(*columns).render_derived(with_types=True)
    return insert(table).from_select(names, select(*rows.c))


def _as_text(value: object) -> str:
    """Return the value as text that PostgreSQL can read."""
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r} must not reach the database")
        return value.astimezone(UTC).isoformat()
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    raise TypeError(f"{type(value).__name__} is no column's value")


def among(
    connection: Connection, column: Column[Any], values: Collection[str]
) -> ColumnElement[bool]:
    """Return `column IN (values)`.

    On PostgreSQL the values are one array parameter. Otherwise hundreds of them are written into
    the statement and parsed one by one.
    """
    if connection.dialect.name == "postgresql":
        return column == any_(bindparam(None, list(values), type_=ARRAY(Text)))
    return column.in_(values)


def _take_ids(connection: Connection, table: Table, count: int) -> list[int]:
    if connection.dialect.name == "postgresql":
        taken = text(
            "SELECT json_agg(nextval(pg_get_serial_sequence(:table, 'id')))"
            " FROM generate_series(1, :n)"
        )
        return connection.execute(taken, {"table": table.name, "n": count}).scalar() or []
    # `BEGIN IMMEDIATE`: no other writer can take these ids before this commit.
    newest = connection.execute(select(func.max(table.c.id))).scalar() or 0
    return list(range(newest + 1, newest + 1 + count))
