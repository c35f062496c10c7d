from __future__ import annotations

import shutil
import zoneinfo

import pytest
from sqlalchemy import make_url

from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from tests.support.books import name_book
from tests.support.contradictions import contradictions
from tests.support.lent_store import Lent
from tests.support.postgres import EmbeddedPostgres
from tests.support.world import World

zoneinfo.reset_tzpath(())  # The tests read the same tz data as the product: the package's.


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What runs on both databases is about rules more than about SQL, unless its module is marked
    `sql`: the quick run takes it through SQLite, and CI's second run through PostgreSQL.
    """
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("database_url") != "postgres":
            continue
        if not any(item.get_closest_marker(name) for name in ("sql", "benchmark", "long")):
            item.add_marker(pytest.mark.again)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    store = Store(f"sqlite:///{path}")
    migrate(store)
    name_book(store, prefix="")
    store.close()
    return path


@pytest.fixture(scope="session")
def postgres():
    with EmbeddedPostgres() as server:
        server.create_database("template_billing")
        store = Store(server.url("template_billing"))
        migrate(store)
        name_book(store, prefix="")
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


@pytest.fixture(scope="session")
def stores():
    """One store for each kind of database: what it has compiled serves the tests after it."""
    kept: dict[str, Lent] = {}
    yield kept
    for lent in kept.values():
        lent.store.close()


@pytest.fixture
def store(database_url, stores):
    kind = make_url(database_url).get_backend_name()
    if kind not in stores:
        stores[kind] = Lent(database_url)
    with stores[kind].for_database(database_url) as store:
        yield store


@pytest.fixture
def world(request, store):
    """A billing world whose books are compared with the gateway's ledger after the test, and asked
    whether they contradict themselves.
    """
    world = World(store)
    yield world
    assert world.discrepancies() == []
    if request.node.get_closest_marker("by_hand") is None:
        assert contradictions(store, world.clock.now(), at_rest=False) == []
