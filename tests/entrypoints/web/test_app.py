from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import delete, update

from billing_worker.clock import SystemClock
from billing_worker.config import load
from billing_worker.entrypoints.web.app import create_app
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.persistence.schema.tables import book, sweep_runs
from billing_worker.persistence.store import Store
from billing_worker.persistence.sweep_runs import add
from tests.entrypoints.test_config import GOOD
from tests.support.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def get(database_url, redis):
    with Store(database_url) as store, store.transaction() as connection:
        for sweep in intervals(load(GOOD)):
            add(connection, sweep, SystemClock().now())

    def get(path, **changes):
        urls = {"BILLING_DATABASE_URL": database_url, "BILLING_REDIS_URL": redis.url}
        return create_app(load(GOOD | urls | changes)).test_client().get(path)

    return get


def test_ready_when_database_and_redis_answer(get):
    answer = get("/health/ready")
    assert (answer.status_code, answer.json["ready"]) == (200, True)


def test_not_ready_while_a_sweep_is_silent_and_says_which(get, database_url):
    with Store(database_url) as store, store.transaction() as connection:
        connection.execute(delete(sweep_runs).where(sweep_runs.c.sweep == "billing.ring"))
        connection.execute(update(book).values(made_at=datetime(2026, 1, 1, tzinfo=UTC)))
    answer = get("/health/ready")
    assert answer.status_code == 503
    assert answer.json["sweeps"].startswith("not ready: not finished: billing.ring for ")


def test_not_ready_when_redis_is_away(get):
    answer = get("/health/ready", BILLING_REDIS_URL="redis://127.0.0.1:1/0")
    assert answer.status_code == 503
    assert answer.json["redis"].startswith("not ready")


def test_not_ready_on_an_unmigrated_database(get, tmp_path):
    answer = get("/health/ready", BILLING_DATABASE_URL=f"sqlite:///{tmp_path}/empty.db")
    assert answer.status_code == 503


def test_alive_even_when_the_neighbours_are_not(get):
    assert get("/health/live", BILLING_REDIS_URL="redis://127.0.0.1:1/0").status_code == 200
