from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from billing_worker.persistence.store import CommitUnknown
from billing_worker.services.attempts.group_commit import MAX_BATCH, GroupCommit
from billing_worker.services.charging.thread_pool import ThreadPool


def test_callers_that_wait_together_share_a_batch_and_get_their_own_answers():
    sizes = []
    asked = threading.Semaphore(0)

    def work(_ports, requests):
        if not sizes:  # the first batch holds the turn until everybody is waiting
            for _ in range(100):
                assert asked.acquire(timeout=5)
            time.sleep(0.2)
        sizes.append(len(requests))
        return [request * 2 for request in requests]

    group = GroupCommit()

    def ask(n):
        asked.release()
        return group(work, None, n)

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, range(100)))
    assert answers == [n * 2 for n in range(100)]
    assert len(sizes) < 50
    assert max(sizes) <= MAX_BATCH


def test_one_bad_request_fails_alone():
    def work(_ports, requests):
        if "bad" in requests:
            time.sleep(0.02)
            raise ValueError("poison")
        return requests

    group = GroupCommit()

    def ask(request):
        try:
            return group(work, None, request)
        except ValueError:
            return "failed"

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, ["good"] * 10 + ["bad"] + ["good"] * 9))
    assert answers.count("failed") == 1


def test_a_commit_that_raised_belongs_to_everybody_in_it_and_is_not_run_again():
    runs = []
    commit_group = threading.Barrier(5)

    def work(_ports, requests):
        runs.append(len(requests))
        time.sleep(0.05)
        if len(requests) > 1:
            raise CommitUnknown("connection lost")
        return requests

    group = GroupCommit()

    def ask(n):
        commit_group.wait()
        try:
            return group(work, None, n)
        except CommitUnknown:
            return "unknown"

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, range(5)))
    assert sum(runs) == 5
    assert answers.count("unknown") == sum(size for size in runs if size > 1)


def test_a_crew_that_is_leaving_begins_nothing_more_and_finishes_what_runs():
    pool = ThreadPool(1)
    begun, may_end = threading.Event(), threading.Event()

    def work(item):
        begun.set()
        may_end.wait(5)
        return item

    with ThreadPoolExecutor(1) as caller:
        future = caller.submit(pool.map, work, [1, 2, 3])
        begun.wait(5)
        pool.leave()
        may_end.set()
        assert future.result(5) == [1]


def test_a_crew_waits_for_all_before_it_tells_of_one_failure():
    pool = ThreadPool(4)
    ended = []

    def work(item):
        if item == 0:
            raise ValueError("first")
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ValueError, match="first"):
        pool.map(work, [0, 1, 2, 3])
    assert sorted(ended) == [1, 2, 3]


def test_a_crew_asks_for_more_only_when_its_threads_are_about_to_be_free():
    pool = ThreadPool(2)
    may_end, asked = threading.Event(), threading.Event()

    def found():
        asked.set()
        return ["later"]

    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(pool.map, lambda _: may_end.wait(5), [1, 2, 3, 4])
        second = callers.submit(pool.take, lambda item: item, found)
        assert not asked.wait(0.2)
        may_end.set()
        assert second.result(5) == ["later"]
        first.result(5)


def test_a_crew_that_is_leaving_asks_for_nothing_more():
    pool = ThreadPool(1)
    pool.leave()
    asked = []
    assert pool.take(asked.append, lambda: asked.append("asked") or [1]) == []
    assert asked == []


def test_each_request_of_a_failed_batch_runs_again_alone_in_the_frame_that_asked():
    """Not in the frame that led the batch: a sale must follow its own commit within seconds."""
    runs = []
    first_may_end = threading.Event()

    def work(_ports, requests):
        runs.append((threading.current_thread().name, list(requests)))
        if requests == ["leader"]:
            assert first_may_end.wait(5)
        if "bad" in requests:
            raise ValueError("poison")
        return [f"{request} done" for request in requests]

    group = GroupCommit()
    answers = {}

    def ask(request):
        try:
            answers[request] = group(work, None, request)
        except ValueError as error:
            answers[request] = error

    def begin(request):
        thread = threading.Thread(target=ask, args=(request,), name=f"frame of {request}")
        thread.start()
        return thread

    threads = [begin("leader")]
    wait_until(lambda: runs)
    threads += [begin(request) for request in ("good", "bad", "fine")]
    wait_until(lambda: len(group._queues[work].waiting) == 3)
    first_may_end.set()
    for thread in threads:
        thread.join(5)
    shared, *again = runs[1:]
    assert sorted(shared[1]) == ["bad", "fine", "good"]
    assert sorted(again) == [(f"frame of {one}", [one]) for one in ("bad", "fine", "good")]
    assert (answers["good"], answers["fine"]) == ("good done", "fine done")
    assert str(answers["bad"]) == "poison"


def wait_until(true):
    for _ in range(1000):
        if true():
            return
        time.sleep(0.005)
    pytest.fail("it never came true")
