"""The environment of another service must not decide where commands and card tokens go."""

from __future__ import annotations

import pytest
from redis import Redis

from billing_worker.client import QUEUE, BillingClient
from billing_worker.entrypoints.worker.doorbell import CHARGES, CeleryBell, doorbell_only
from tests.support.redis_server import RedisServer

THEIRS = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def variables_of_another_service(monkeypatch):
    for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(f"CELERY_{name}", THEIRS)


@pytest.fixture
def length(ours):
    def length(queue):
        with Redis.from_url(ours.url) as client:
            return client.llen(queue)

    return length


def test_a_command_goes_to_the_broker_that_its_client_was_given(ours, length):
    before = length(QUEUE)
    BillingClient(ours.url, answers=False).cancel(
        reference_id="c-1", subscription="sub-1", at_period_end=True
    )
    assert length(QUEUE) == before + 1


def test_an_answer_is_read_where_the_client_was_told(ours):
    sent = BillingClient(ours.url).cancel(
        reference_id="c-2", subscription="sub-1", at_period_end=True
    )
    with pytest.raises(TimeoutError):  # and no ConnectionError of the other one
        sent.answer(timeout=0.1)


def test_a_message_of_the_web_process_wakes_our_own_workers(ours, length):
    before = length(CHARGES)
    CeleryBell(doorbell_only(ours.url)).charge([7])
    assert length(CHARGES) == before + 1
