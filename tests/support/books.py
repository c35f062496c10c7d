"""Which book a test's database holds. Most tests write references as a book without a prefix has them."""

from __future__ import annotations

from sqlalchemy import update

from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store


def name_book(store: Store, **values: str) -> None:
    """`identity`, `prefix`."""
    with store.transaction() as connection:
        connection.execute(update(tables.book).values(**values))
