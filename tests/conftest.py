from __future__ import annotations

import shutil
import zoneinfo

import pytest
from sqlalchemy import make_url

from billing_worker.persistence.migrate import migrate
from billing_worker.persistence.store import Store
from tests.support.books import name_book
from tests.support.lent_store import Lent
from tests.support.postgres import EmbeddedPostgres
from tests.support.world import World

zoneinfo.reset_tzpath(())  # The tests read the same tz data as the product: the package's.


RULES = {
    "test_hosted", "test_lifecycle", "test_catch_up", "test_dunning", "test_preview",
    "test_preview_attack", "test_restored", "test_decided_at", "test_hand_over",
    "test_paid_before_handed_out", "test_stale_messages",
    "test_lost_memory", "test_refusals",
    "test_commands", "test_cards", "test_overview", "test_charge_troubles", "test_resolve",
    "test_late_money", "test_failures", "test_two_books", "test_refused_creates", "test_debts",
    "test_beside_an_unknown",
}  # fmt: skip
"""Modules about rules more than about SQL: the quick run takes them through one database."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        over_postgres = parameters.get("database_url") == "postgres"
        is_campaign = any(item.iter_markers("benchmark")) or any(item.iter_markers("long"))
        if over_postgres and not is_campaign and item.module.__name__.rpartition(".")[-1] in RULES:
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
def world(store):
    """A billing world whose books are compared with the gateway's ledger after the test."""
    world = World(store)
    yield world
    assert world.discrepancies() == []
