from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence import cards as stored_cards
from billing_worker.persistence.bulk import among, insert_rows
from billing_worker.persistence.schema.tables import cards, customers

FOREIGN_CARD = "belongs to another customer"


def ids_for(
    connection: Connection, people: Sequence[dict[str, Any]], now: datetime
) -> dict[str, int]:
    """Find or add customers by reference id. A known one keeps its name and e-mail."""
    by_reference: dict[str, dict[str, Any]] = {}
    for person in people:
        by_reference.setdefault(person["reference_id"], person)
    known = _known(connection, list(by_reference))
    new = [
        {**person, "created_at": now}
        for reference, person in by_reference.items()
        if reference not in known
    ]
    if new:
        ids = insert_rows(connection, customers, new)
        known |= {person["reference_id"]: row_id for person, row_id in zip(new, ids, strict=True)}
    return known


def _known(connection: Connection, references: Sequence[str]) -> dict[str, int]:
    query = select(customers.c.reference_id, customers.c.id).where(
        among(connection, customers.c.reference_id, references)
    )
    return {row.reference_id: row.id for row in connection.execute(query)}


def add_cards(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Insert cards with encrypted tokens. Return their ids in the order of `rows`.

    A card with a known fingerprint inherits its past: refused for good stays refused. Raises
    InvalidInput on `card.token` if another customer has the card.
    """
    if not rows:
        return []
    owner_of: dict[str, int] = {}
    for row in rows:
        _require_own(
            owner_of.setdefault(row["fingerprint"], row["customer_id"]), row["customer_id"]
        )
    past: dict[str, Row[Any]] = {}
    for known in stored_cards.lock_known(connection, owner_of):
        _require_own(known.customer_id, owner_of[known.fingerprint])
        past[known.fingerprint] = known
    inherited = (past.get(row["fingerprint"]) for row in rows)
    rows = [
        row | {"declined_at": known and known.declined_at,
               "unusable_reason": known and known.unusable_reason}
        for row, known in zip(rows, inherited, strict=True)
    ]  # fmt: skip
    return insert_rows(connection, cards, rows)


def _require_own(owner_id: int, customer_id: int) -> None:
    if owner_id != customer_id:
        raise InvalidInput("card.token", FOREIGN_CARD)
