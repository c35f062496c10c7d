from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from billing_worker.persistence.migrate import migrate, newest_revision
from billing_worker.persistence.store import Store
from billing_worker.persistence.tables import metadata


def test_the_migrations_build_the_tables_that_the_code_describes(store):
    with store.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(store):
    assert migrate(store) == (newest_revision(), newest_revision())


def test_two_migrations_of_an_empty_postgres_database_at_once_take_turns(postgres):
    with postgres.temporary_database() as url:
        results = []

        def run():
            store = Store(url)
            results.append(migrate(store))
            store.close()

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {before for before, _ in results} == {None, newest_revision()}


@pytest.mark.parametrize("statement", ["UPDATE events SET kind = 'x'", "DELETE FROM events"])
def test_history_cannot_be_rewritten(world, statement):
    world.subscribe()
    with pytest.raises(DBAPIError, match="append-only"), world.store.transaction() as connection:
        connection.execute(text(statement))
