"""The queue of commands on a real server: a message is nowhere else than where it cannot be lost."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest
from celery import Celery
from kombu import Queue
from redis import Redis

from billing_worker.config import load
from billing_worker.entrypoints.worker import command_queue
from billing_worker.entrypoints.worker.command_consumer import (
    Intake,
    subject_of_message,
    takes_commands,
)
from billing_worker.entrypoints.worker.command_message import LONGEST_ENVELOPE
from billing_worker.entrypoints.worker.command_queue import WINDOW, CommandQueue
from billing_worker.entrypoints.worker.doorbell import COMMANDS, SWEEPS
from billing_worker.services.commands.execute import Answer, NotKept
from tests.entrypoints.test_config import GOOD
from tests.entrypoints.worker.test_command_message import message
from tests.support.redis_server import RedisServer

STAY = threading.Event()
QUICKLY = 0.01


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(server):
    server.wipe()
    with Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def queue(redis):
    return CommandQueue(redis, "q")


def test_a_message_stays_in_the_list_until_it_is_done(redis, queue):
    redis.lpush("q", b"one")
    taken = queue.take(QUICKLY, STAY)
    assert taken.raw == b"one"
    assert redis.lrange("q", 0, -1) == [b"one"]
    queue.done(taken)
    assert redis.keys() == []


def test_the_oldest_comes_first_and_nobody_gets_what_another_works_on(redis, queue):
    redis.lpush("q", b"one", b"two")
    assert queue.take(QUICKLY, STAY).raw == b"one"
    assert queue.take(QUICKLY, STAY).raw == b"two"
    assert queue.take(QUICKLY, STAY) is None


def test_what_is_given_back_comes_again(redis, queue):
    redis.lpush("q", b"one")
    queue.give_back(queue.take(QUICKLY, STAY))
    assert queue.take(QUICKLY, STAY).raw == b"one"


def test_a_taker_that_dies_holds_a_message_for_a_minute_at_most(redis, queue):
    redis.lpush("q", b"one")
    queue.take(QUICKLY, STAY)
    [lease] = redis.keys("q.lease:*")
    assert 0 < redis.ttl(lease) <= command_queue.LEASE_SECONDS
    redis.delete(lease)  # the minute passes
    assert queue.take(QUICKLY, STAY).raw == b"one"


def test_a_message_that_was_finished_since_the_poll_is_not_taken_again(redis, queue):
    redis.lpush("q", b"one")
    other = CommandQueue(redis, "q")
    seen = list(queue._oldest("q"))
    other.done(other.take(QUICKLY, STAY))
    queue._oldest = lambda key: seen if key == "q" else []
    assert queue._find() == (None, True)
    assert redis.keys() == []


def test_of_a_message_that_is_too_long_only_a_part_is_fetched_and_all_of_it_removed(redis, queue):
    redis.lpush("q", b"x" * (LONGEST_ENVELOPE + 9), b"x" * (LONGEST_ENVELOPE + 10), b"next")
    for _ in range(2):
        taken = queue.take(QUICKLY, STAY)
        assert len(taken.raw) == LONGEST_ENVELOPE + 1
        queue.done(taken)
    assert redis.lrange("q", 0, -1) == [b"next"]


def test_equal_messages_are_done_one_at_a_time(redis, queue):
    redis.lpush("q", b"same", b"same")
    queue.done(queue.take(QUICKLY, STAY))
    assert redis.lrange("q", 0, -1) == [b"same"]


def test_a_priority_only_names_another_list(redis, queue):
    redis.lpush("q\x06\x166", b"urgent")
    assert queue.take(QUICKLY, STAY).raw == b"urgent"


def test_many_takers_do_each_of_many_messages_once(server, redis):
    sent = [f"message {number}".encode() for number in range(WINDOW * 4)]
    redis.lpush("q", *sent)
    done = Counter()

    def work():
        with Redis.from_url(server.url) as client:
            mine = CommandQueue(client, "q")
            while client.exists("q"):
                taken = mine.take(QUICKLY, STAY)
                if taken is not None:
                    done[taken.raw] += 1
                    mine.done(taken)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == Counter(sent)
    assert redis.keys() == []


def test_a_poll_holds_one_message_at_a_time_however_large_they_are(redis, queue):
    megabyte = 2**20
    large = [str(number).encode() * (2 * megabyte) for number in range(9)]
    redis.lpush("q", *large)
    taken = [queue.take(QUICKLY, STAY) for _ in large]
    assert {message.raw for message in taken} == set(large)
    del taken, large
    tracemalloc.start()
    takers = [threading.Thread(target=queue.take, args=(QUICKLY, STAY)) for _ in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2 * megabyte * 1.5  # a reply is held two or three times while it comes


def test_a_thread_that_is_to_leave_does_not_wait_for_the_one_that_polls(queue):
    leaving = threading.Event()
    takers = [threading.Thread(target=queue.take, args=(1.0, leaving)) for _ in range(4)]
    started = time.monotonic()
    for taker in takers:
        taker.start()
    leaving.set()
    for taker in takers:
        taker.join()
    assert time.monotonic() - started < 3.0  # four looks in a row would be 4 s


# --- messages about one subject ------------------------------------------------------------------


@pytest.fixture
def ordered(redis):
    """Messages whose first letter is equal are about one subject; `-` begins those about none."""
    return CommandQueue(redis, "q", lambda raw: None if raw.startswith(b"-") else raw[:1])


def test_a_message_waits_for_the_older_one_about_its_subject_and_holds_up_no_other(redis, ordered):
    redis.lpush("q", b"a1", b"a2", b"b1", b"-1", b"-2", b"a3")
    first, *others = [ordered.take(QUICKLY, STAY) for _ in range(4)]
    assert [taken.raw for taken in (first, *others)] == [b"a1", b"b1", b"-1", b"-2"]
    assert ordered.take(QUICKLY, STAY) is None
    ordered.done(first)
    assert ordered.take(QUICKLY, STAY).raw == b"a2"
    assert ordered.take(QUICKLY, STAY) is None


def test_a_message_that_is_given_back_still_comes_before_the_younger_ones(redis, ordered):
    redis.lpush("q", b"a1", b"a2")
    ordered.give_back(ordered.take(QUICKLY, STAY))
    assert ordered.take(QUICKLY, STAY).raw == b"a1"
    assert ordered.take(QUICKLY, STAY) is None


def test_a_message_whose_taker_died_is_not_overtaken_while_its_lease_lasts(redis, ordered):
    redis.lpush("q", b"a1", b"a2")
    ordered.take(QUICKLY, STAY)
    successor = CommandQueue(redis, "q", lambda raw: raw[:1])
    assert successor.take(QUICKLY, STAY) is None
    [lease] = redis.keys("q.lease:*")
    redis.delete(lease)  # the minute passes
    assert successor.take(QUICKLY, STAY).raw == b"a1"


# --- the threads of a worker ---------------------------------------------------------------------


@pytest.fixture
def intake(redis, monkeypatch):
    """Starts an intake whose commands `answer` like this; returns what was replied."""
    replies = []
    running = []

    def start(carry_out):
        monkeypatch.setattr(
            "billing_worker.entrypoints.worker.command_consumer.carry_out", carry_out
        )
        monkeypatch.setattr(
            "billing_worker.entrypoints.worker.command_consumer.PAUSE_SECONDS", QUICKLY
        )
        queue = CommandQueue(redis, "q", subject_of_message)
        intake = Intake(queue, lambda: None, lambda *reply: replies.append(reply))
        running.append(intake)
        intake.start()
        return replies

    yield start
    for intake in running:
        intake.leave()


def until(condition):
    for _ in range(500):
        if condition():
            return
        STAY.wait(0.01)
    raise AssertionError("not within 5 s")


def test_a_command_that_could_not_be_written_down_is_tried_until_it_is(redis, intake):
    tries = []

    def carry_out(_ports, _message):
        tries.append(1)
        if len(tries) < 5:
            raise NotKept("database: away")
        return Answer("done")

    redis.lpush("q", message())
    replies = intake(carry_out)
    until(lambda: replies)
    until(lambda: redis.keys() == [])
    assert replies == [("id-1", {"status": "done", "errors": []})]


def test_a_bug_of_ours_neither_ends_the_threads_nor_loses_the_message(redis, intake):
    def carry_out(_ports, asked):
        if asked.id == "id-1":
            raise ZeroDivisionError
        return Answer("done")

    about_another = {"reference_id": "c-2", "subscription": "sub-2"}
    headers = {"task": "billing.pause", "id": "id-2"}
    redis.lpush("q", message(), message(([about_another], {}, {}), headers))
    replies = intake(carry_out)
    until(lambda: replies)
    assert replies[0][0] == "id-2"
    until(lambda: redis.lrange("q", 0, -1) == [message()])


def test_no_answer_is_left_for_who_wants_none(redis, intake):
    headers = {"task": "billing.pause", "id": "id-1", "ignore_result": True}
    redis.lpush("q", message(headers=headers))
    replies = intake(lambda *_: Answer("done"))
    until(lambda: redis.keys() == [])
    assert replies == []


def test_commands_of_one_subscription_are_carried_out_in_the_order_they_came_over_all_workers(
    redis, intake
):
    begun, ended = [], []

    def carry_out(_ports, asked):
        begun.append(asked.id)
        if asked.task == "billing.subscribe":
            STAY.wait(0.02)  # long enough to be overtaken
        ended.append(asked.id)
        return Answer("done")

    sent = []
    for number in range(20):
        name = f"sub-{number}"
        told = {"reference_id": f"cancel-{number}", "subscription": name, "at_period_end": False}
        pay = {"reference_id": f"pay-{number}", "invoice": f"{name}-p0"}
        for task, record in (("subscribe", {"reference_id": name}), ("cancel", told),
                             ("start_checkout", pay)):  # fmt: skip
            headers = {"task": f"billing.{task}", "id": f"{name}:{len(sent) % 3}"}
            sent.append(message(([record], {}, {}), headers))
    redis.lpush("q", *sent)
    for _ in range(3):
        intake(carry_out)
    until(lambda: redis.keys() == [])
    for number in range(20):
        in_order = [f"sub-{number}:{step}" for step in range(3)]
        for seen in (begun, ended):
            assert [one for one in seen if one.startswith(f"sub-{number}:")] == in_order


@pytest.mark.parametrize(
    ("selected", "consumed", "enabled"),
    [(None, {SWEEPS}, True), ([COMMANDS], set(), True), ([SWEEPS], {SWEEPS}, False)],
)
def test_the_choice_of_queues_decides_whether_a_worker_takes_commands(selected, consumed, enabled):
    app = Celery(set_as_current=False)
    app.conf.update(task_queues=[Queue(SWEEPS), Queue(COMMANDS)])
    app.amqp.queues.select(selected)
    step = takes_commands(load(GOOD), lambda: None)(SimpleNamespace(app=app))
    assert set(app.amqp.queues.consume_from) == consumed
    assert step.enabled is enabled
