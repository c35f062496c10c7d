"""Every column that the vault encrypts, read in batches and written back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Row, bindparam, func, select, update

from billing_worker.domain.secret import (
    OF_CALLBACK,
    OF_PAGE,
    Place,
    bearer_of,
    card_of,
    webhook_to,
)
from billing_worker.persistence.schema.outgoing import webhook_endpoints
from billing_worker.persistence.schema.tables import attempts, callbacks, card_setups, cards

BATCH = 500


@dataclass(frozen=True, slots=True)
class EncryptedColumn:
    called: str
    """What it holds, in words for a person."""
    column: Column[Any]
    place: Callable[[Row[Any]], Place]

    def count(self, connection: Connection) -> int:
        """Count the rows that hold something: a removed card's token is empty."""
        query = select(func.count()).select_from(self.column.table)
        return connection.execute(query.where(*self._holds())).scalar_one()

    def batch(self, connection: Connection, after_id: int) -> Sequence[Row[Any]]:
        """Return up to BATCH rows with larger ids, by id: the whole row, and it as `locked`."""
        table = self.column.table
        query = select(table, self.column.label("locked"))
        found = query.where(table.c.id > after_id, *self._holds()).order_by(table.c.id)
        return connection.execute(found.limit(BATCH)).all()

    def swap(self, connection: Connection, renewed: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Write (id, old, new), but only where the old value still stands."""
        table = self.column.table
        changed = (
            update(table)
            .where(table.c.id == bindparam("row_id"), self.column == bindparam("old"))
            .values({self.column.name: bindparam("new")})
        )
        rows = [{"row_id": row_id, "old": old, "new": new} for row_id, old, new in renewed]
        connection.execute(changed, rows)

    def _holds(self) -> tuple[Any, Any]:
        return self.column.is_not(None), self.column != b""


COLUMNS = (
    EncryptedColumn("card tokens", cards.c.token, lambda row: card_of(row.customer_id)),
    EncryptedColumn("bearers", attempts.c.bearer, lambda row: bearer_of(row.id)),
    EncryptedColumn("pages of pay links", attempts.c.page, lambda _: OF_PAGE),
    EncryptedColumn("pages of card setups", card_setups.c.page, lambda _: OF_PAGE),
    EncryptedColumn("callbacks", callbacks.c.body, lambda _: OF_CALLBACK),
    EncryptedColumn("webhook secrets", webhook_endpoints.c.secret, lambda row: webhook_to(row.url)),
    EncryptedColumn(
        "old webhook secrets", webhook_endpoints.c.old_secret, lambda row: webhook_to(row.url)
    ),
)


def batches(
    reading: Callable[[int], Sequence[Row[Any]]],
) -> Iterator[Sequence[Row[Any]]]:
    """Yield batch after batch. `reading` returns the rows after an id."""
    last = 0
    while rows := reading(last):
        yield rows
        last = rows[-1].id
