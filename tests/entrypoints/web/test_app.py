from __future__ import annotations

import pytest

from billing_worker.config import load
from billing_worker.entrypoints.web.app import create_app
from tests.entrypoints.test_config import GOOD
from tests.support.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def get(database_url, redis):
    def get(path, **changes):
        urls = {"BILLING_DATABASE_URL": database_url, "BILLING_REDIS_URL": redis.url}
        return create_app(load(GOOD | urls | changes)).test_client().get(path)

    return get


def test_ready_when_database_and_redis_answer(get):
    answer = get("/health/ready")
    assert (answer.status_code, answer.json["ready"]) == (200, True)


def test_not_ready_when_redis_is_away(get):
    answer = get("/health/ready", BILLING_REDIS_URL="redis://127.0.0.1:1/0")
    assert answer.status_code == 503
    assert answer.json["redis"].startswith("not ready")


def test_not_ready_on_an_unmigrated_database(get, tmp_path):
    answer = get("/health/ready", BILLING_DATABASE_URL=f"sqlite:///{tmp_path}/empty.db")
    assert answer.status_code == 503


def test_alive_even_when_the_neighbours_are_not(get):
    assert get("/health/live", BILLING_REDIS_URL="redis://127.0.0.1:1/0").status_code == 200
