"""Many rows in one statement are the rows that were given; on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select
from sqlalchemy.exc import DataError, IntegrityError

from billing_worker.persistence.bulk import among, insert_many, insert_rows
from billing_worker.persistence.schema.tables import cards, customers, events
from billing_worker.persistence.store import Store

pytestmark = pytest.mark.sql

NOW = datetime(2026, 1, 31, 12, 34, 56, 789012, tzinfo=UTC)
TEXTS = [
    None, "", "null", "'\"\\", "\\x41", "\\u0041", "{}", "tab\tline\n", "Zoë 🎈", "\x7f\x01",
    " spaces ", "x" * 70_000,
]  # fmt: skip
DATA = [
    {}, {"a": [None, True, 1.5, -(10**40), {"b": []}]}, {"ä'\"\\": "\\u0000 🎈"},
    {"text": "\x7f\x1f"},
]  # fmt: skip


def person(number, **terms):
    row = {"reference_id": f"c-{number}", "name": None, "email": None, "created_at": NOW}
    return row | terms


def told(number, data):
    return {"at": NOW, "kind": "subscription.changed", "by": "ann", "alert": bool(number % 2),
            "subscription_id": number, "invoice_id": None, "attempt_id": None,
            "data": data}  # fmt: skip


def test_text_and_instants_come_back_as_they_were_given(store):
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5, minutes=45)))
    rows = [person(n, name=text, created_at=elsewhere) for n, text in enumerate(TEXTS)]
    with store.transaction() as connection:
        ids = insert_rows(connection, customers, rows)
        found = connection.execute(select(customers).order_by(customers.c.id)).all()
    assert [row.id for row in found] == ids == sorted(ids)
    assert [row.name for row in found] == TEXTS
    assert {row.created_at for row in found} == {NOW}


def test_bytes_come_back_as_they_were_given(store):
    token = bytes(range(256))
    with store.transaction() as connection:
        [owner] = insert_rows(connection, customers, [person(1)])
        row = {"customer_id": owner, "token": token, "expiry_month": 12, "created_at": NOW}
        insert_rows(connection, cards, [row, row | {"token": b""}])
        found = connection.execute(select(cards.c.token).order_by(cards.c.id)).scalars().all()
    assert [bytes(one) for one in found] == [token, b""]


def test_events_come_back_in_their_order_with_their_data(store):
    with store.transaction() as connection:
        insert_many(connection, events, [told(n, data) for n, data in enumerate(DATA)])
        found = connection.execute(select(events).order_by(events.c.id)).all()
    assert [row.data for row in found] == DATA
    assert [row.alert for row in found] == [False, True, False, True]


def test_a_naive_instant_is_refused(store):
    with store.transaction() as connection, pytest.raises(Exception, match="naive datetime"):
        insert_rows(connection, customers, [person(1, created_at=NOW.replace(tzinfo=None))])


def test_a_reference_twice_is_an_integrity_error(store):
    with pytest.raises(IntegrityError), store.transaction() as connection:
        insert_rows(connection, customers, [person(1), person(1)])


def test_text_too_long_for_its_column_is_refused_and_not_cut(postgres_url):
    with (
        Store(postgres_url) as store,  # SQLite knows no length of a text
        pytest.raises(DataError),
        store.transaction() as connection,
    ):
        insert_rows(connection, customers, [person("x" * 200)])


def test_no_rows_are_no_statement(store):
    with store.transaction() as connection:
        assert insert_rows(connection, customers, []) == []


@pytest.mark.parametrize("asked", [[], ["c-1"], ["c-2", "c-1", "c-1", "nobody", 'c-"1', "{c-1}"]])
def test_rows_are_found_by_any_of_many_values(store, asked):
    with store.transaction() as connection:
        insert_rows(connection, customers, [person(n) for n in range(3)])
        query = select(customers.c.reference_id).where(
            among(connection, customers.c.reference_id, asked)
        )
        found = set(connection.execute(query).scalars())
    assert found == set(asked) & {"c-0", "c-1", "c-2"}
