"""How a question about the books is asked: its shape and its parameters.

Each question selects what breaks a rule: the `id` of a row, and its `reference` for people. The ones
over whole tables are asked about a range of ids, so that each stays short however large the book is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    TextClause,
    bindparam,
    func,
    select,
)

from billing_worker.persistence.schema.columns import Instant

MOST_FOUND = 200
"""A rule that everything breaks is told of by its first rows."""

BEFORE: BindParameter[datetime] = bindparam("before", type_=Instant)
"""What was due by then is late."""

DAY_AGO: BindParameter[datetime] = bindparam("day_ago", type_=Instant)
MONTH_AGO: BindParameter[datetime] = bindparam("month_ago", type_=Instant)


Condition = ColumnElement[bool] | TextClause


@dataclass(frozen=True, slots=True)
class Question:
    """What breaks a rule. `by` None: an index finds all that could, and it is read whole."""

    breaks: Select[Any]
    by: Column[int] | None = None


def whole(row_id: Any, reference: Any, *conditions: Condition) -> Select[Any]:
    """Select what breaks a rule, of rows that an index finds."""
    columns = row_id.label("id"), reference.label("reference")
    return select(*columns).where(*conditions).limit(MOST_FOUND)


def sliced(row_id: Column[int], reference: Any, *conditions: Condition) -> Select[Any]:
    """Select what breaks a rule, of rows in a range of ids."""
    between = row_id.between(bindparam("first"), bindparam("last"))
    return whole(row_id, reference, between, *conditions)


def ask(
    connection: Connection, question: Question, now: datetime, before: datetime, ids: range
) -> Sequence[Row[Any]]:
    """Return (id, reference) of what breaks the rule. `ids`: of a question about a range."""
    parameters = {
        "before": before,
        "day_ago": now - timedelta(days=1),
        "month_ago": now - timedelta(days=30),
        "first": ids.start,
        "last": ids.stop - 1,
    }
    return connection.execute(question.breaks, parameters).all()


def last_id(connection: Connection, column: Column[int]) -> int:
    newest: int | None = connection.execute(select(func.max(column))).scalar()
    return newest or 0
