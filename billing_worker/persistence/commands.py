"""Commands from other services with their results. Rows are never deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.persistence.schema.tables import commands

_DONE = commands.c.outcome == "done"


def claim(connection: Connection, row: dict[str, Any]) -> int | None:
    """Record a command as done before it is carried out, in the same transaction.

    The unique key makes a repeated command wait for this transaction. Return None if the same task
    and reference id is already done.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = (
        dialect.insert(commands)
        .values(**row, outcome="done", errors=[], answer={})
        .on_conflict_do_nothing(
            index_elements=["task", "reference_id"], index_where=text("outcome = 'done'")
        )
        .returning(commands.c.id)
    )
    return connection.execute(statement).scalar()


def conclude(
    connection: Connection,
    command_id: int,
    *,
    outcome: str,
    errors: Sequence[dict[str, Any]],
    answer: dict[str, Any],
) -> None:
    connection.execute(
        update(commands)
        .where(commands.c.id == command_id)
        .values(outcome=outcome, errors=list(errors), answer=answer)
    )


def add(connection: Connection, row: dict[str, Any]) -> None:
    connection.execute(insert(commands), row)


def done(connection: Connection, task: str, reference_id: str) -> Row[Any] | None:
    query = select(commands).where(
        commands.c.task == task, commands.c.reference_id == reference_id, _DONE
    )
    return connection.execute(query).one_or_none()


def done_page(connection: Connection, after_id: int, limit: int) -> Sequence[Row[Any]]:
    """Return commands that were carried out, in the order of their rows."""
    query = select(commands).where(_DONE, commands.c.id > after_id)
    return connection.execute(query.order_by(commands.c.id).limit(limit)).all()


def remember(connection: Connection, rows: Sequence[dict[str, Any]]) -> int:
    """Record commands that another book has carried out. Return how many are new."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = (
        dialect.insert(commands)
        .on_conflict_do_nothing(
            index_elements=["task", "reference_id"], index_where=text("outcome = 'done'")
        )
        .returning(commands.c.id)
    )
    done = [row | {"outcome": "done", "errors": []} for row in rows]
    return len(connection.execute(statement, done).all()) if done else 0


def of_message(connection: Connection, message_id: str, digest: str) -> Row[Any] | None:
    """Return the result of this message if it was delivered before."""
    query = (
        select(commands)
        .where(commands.c.message_id == message_id, commands.c.digest == digest)
        .order_by(commands.c.id)
        .limit(1)
    )
    return connection.execute(query).one_or_none()


def listed(
    connection: Connection,
    *,
    limit: int,
    outcomes: Sequence[str] = (),
    reference_id: str | None = None,
    message_id: str | None = None,
) -> Sequence[Row[Any]]:
    """Return the newest commands, newest first, filtered by what is given."""
    query = select(commands).order_by(commands.c.id.desc()).limit(limit)
    if outcomes:
        query = query.where(commands.c.outcome.in_(outcomes))
    if reference_id is not None:
        query = query.where(commands.c.reference_id == reference_id)
    if message_id is not None:
        query = query.where(commands.c.message_id == message_id)
    return connection.execute(query).all()
