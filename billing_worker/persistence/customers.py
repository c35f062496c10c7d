from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from billing_worker.persistence.tables import cards, customers


def ids_for(
    connection: Connection, people: Sequence[dict[str, Any]], now: datetime
) -> dict[str, int]:
    """Find or add customers by reference id. A known one keeps its name and e-mail."""
    by_reference = {person["reference_id"]: person for person in people}
    known = _known(connection, list(by_reference))
    new = [
        {**person, "created_at": now}
        for reference, person in by_reference.items()
        if reference not in known
    ]
    if new:
        result = connection.execute(
            insert(customers).returning(customers.c.id, sort_by_parameter_order=True), new
        )
        known |= {
            person["reference_id"]: row_id
            for person, row_id in zip(new, result.scalars(), strict=True)
        }
    return known


def _known(connection: Connection, references: Sequence[str]) -> dict[str, int]:
    query = select(customers.c.reference_id, customers.c.id).where(
        customers.c.reference_id.in_(references)
    )
    return {row.reference_id: row.id for row in connection.execute(query)}


def add_cards(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Insert cards (tokens already encrypted); the ids come back in the order of `rows`."""
    if not rows:
        return []
    result = connection.execute(
        insert(cards).returning(cards.c.id, sort_by_parameter_order=True), list(rows)
    )
    return list(result.scalars())
