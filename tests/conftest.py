from __future__ import annotations

import shutil
import zoneinfo

import pytest

from billing_worker.persistence.migrate import migrate
from billing_worker.persistence.store import Store
from tests.support.postgres import EmbeddedPostgres
from tests.support.world import World

zoneinfo.reset_tzpath(())  # The tests read the same tz data as the product: the package's.


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    store = Store(f"sqlite:///{path}")
    migrate(store)
    store.close()
    return path


@pytest.fixture(scope="session")
def postgres():
    with EmbeddedPostgres() as server:
        server.create_database("template_billing")
        store = Store(server.url("template_billing"))
        migrate(store)
        store.close()
        yield server


@pytest.fixture
def sqlite_url(sqlite_template, tmp_path):
    path = tmp_path / "billing.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgres_url(postgres):
    with postgres.temporary_database(template="template_billing") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request):
    """Every test that asks for it runs on both databases."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def store(database_url):
    store = Store(database_url)
    yield store
    store.close()


@pytest.fixture
def world(store):
    """A billing world whose books are compared with the gateway's ledger after the test."""
    world = World(store)
    yield world
    assert world.discrepancies() == []
