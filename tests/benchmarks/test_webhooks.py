"""Deliveries per second beside a bare `requests.post` loop, and the age of an event at its first try.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_webhooks.py

Figures are printed, not asserted: they are about the machine as much as about us. What is asserted is
that every event was taken.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

import pytest
import requests
from sqlalchemy import func, select

from billing_worker.clock import SystemClock
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.outgoing.webhooks import USUAL_WAITS
from billing_worker.domain.secret import Secret
from billing_worker.persistence import history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.schema.outgoing import public_events
from billing_worker.persistence.schema.tables import attempts
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.receivers.post import Poster
from billing_worker.services.outbox import endpoints
from billing_worker.services.outbox.deliver import MOST_IN_FLIGHT, Outbound, deliver
from billing_worker.services.outbox.publish import publish
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.benchmarks.test_throughput import (
    PROCESSES,
    sandbox,
    settled,
    subscribe_many,
)
from tests.support.ports import free_port
from tests.support.processes import Process, beat, eventually, worker
from tests.support.records import monthly
from tests.support.redis_server import RedisServer
from tests.support.world import KEY

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

EVENTS = 2_000
PER_SECOND, SECONDS = 100, 20
SHORT_ROUND = 400
LOWEST = "19"
"""Priority of what stands for other machines, or gives way to charges."""


@contextmanager
def fast_receiver(folder):
    port = free_port()
    script = str(Path(__file__).parent / "fast_receiver.py")
    process = Process([sys.executable, script, str(port)], {}, folder / "receiver.log")
    url = f"http://127.0.0.1:{port}/"
    try:
        eventually(lambda: _answers(url), why="the receiver listens")
        _give_way(process)
        yield url
    finally:
        process.kill()


def _give_way(process):
    """Let it run when nobody else wants the processor. Linux compares the priorities of sessions."""
    Path(f"/proc/{process.pid}/autogroup").write_text(LOWEST)
    os.setpriority(os.PRIO_PGRP, process.pid, int(LOWEST))


def _answers(url):
    try:
        return requests.get(url, timeout=1).ok
    except requests.ConnectionError:
        return False


def _outbound(store, url):
    vault = FernetVault(Secret(KEY))
    endpoints.add(store, vault, SystemClock(), url=url, types=None, allow_private=True)
    return Outbound(store, SystemClock(), vault, Poster(allow_private=True), USUAL_WAITS)


def _subscribed(store, count):
    anchor = SystemClock().now() + timedelta(days=1)
    records = [monthly(number, "approved", anchor) for number in range(count)]
    subscribe(store, FernetVault(Secret(KEY)), SystemClock(), records, by="benchmark")


def test_deliveries_per_second_to_a_fast_receiver(postgres, tmp_path):
    with (
        postgres.temporary_database(template="template_billing") as database,
        Store(database) as store,
        fast_receiver(tmp_path) as url,
        ThreadPoolExecutor(MOST_IN_FLIGHT) as threads,
    ):
        bare = _bare_rate(url, threads)
        out = _outbound(store, url)
        _subscribed(store, EVENTS)
        started = time.monotonic()
        publish(store, SystemClock())
        published = time.monotonic()
        deliver(out, 1, threads)
        seconds = time.monotonic() - published
        taken = requests.get(url, timeout=10).json()
    print(f"\n{EVENTS} events to one endpoint, {MOST_IN_FLIGHT} requests in flight")
    print(f"  numbered             {EVENTS / (published - started):7.1f}/s")
    print(f"  delivered            {EVENTS / seconds:7.1f}/s")
    print(f"  bare requests.post   {bare:7.1f}/s, ratio {EVENTS / seconds / bare:.2f}")
    assert len(taken) == EVENTS + 1  # the bare loop has no id


def _bare_rate(url, threads):
    session = requests.Session()
    body = b'{"type":"invoice.paid"}' + b" " * 1_000
    started = time.monotonic()
    list(threads.map(lambda _: session.post(url, data=body, timeout=5).status_code, range(EVENTS)))
    return EVENTS / (time.monotonic() - started)


def test_age_of_an_event_at_its_first_try_with_100_events_a_second(postgres, tmp_path):
    with (
        postgres.temporary_database(template="template_billing") as database,
        Store(database) as store,
        RedisServer(tmp_path / "redis") as redis,
        fast_receiver(tmp_path) as url,
    ):
        _outbound(store, url)
        settings = _settings(database, redis.url)
        with beat(settings, tmp_path), worker(settings, tmp_path):
            for second in range(SECONDS):
                _tell(store, second)
            wanted = PER_SECOND * SECONDS
            eventually(lambda: len(requests.get(url, timeout=10).json()) >= wanted, 60, why="taken")
            taken = requests.get(url, timeout=10).json()
        with store.reading() as connection:
            c = public_events.c
            ids = connection.execute(select(c.event_id, c.at)).all()
    ages = sorted(taken[row.event_id] - row.at.timestamp() for row in ids)
    print(f"\n{len(ages)} events at {PER_SECOND}/s, from the commit to the first try: "
          f"median {ages[len(ages) // 2]:.2f} s, p99 {ages[len(ages) * 99 // 100]:.2f} s, "
          f"worst {ages[-1]:.2f} s")  # fmt: skip
    assert len(ages) == wanted


def _settings(database, redis):
    return {
        "BILLING_DATABASE_URL": database,
        "BILLING_REDIS_URL": redis,
        "BILLING_GATEWAY_URL": "http://127.0.0.1:1/api",
        "BILLING_CARDGATE_URL": "http://127.0.0.1:1",
        "BILLING_GATEWAY_USERNAME": "nobody",
        "BILLING_GATEWAY_PASSWORD": "nobody",
        "BILLING_TEST_MODE": "true",
        "BILLING_VAULT_KEYS": KEY,
        "BILLING_WEBHOOKS_ALLOW_PRIVATE": "true",
        "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
    }


def _tell(store, second):
    """One second of commits of ten facts each, about a thousand subscriptions in turn."""
    for tenth in range(10):
        began = time.monotonic()
        now = SystemClock().now()
        with store.transaction() as connection:
            entries = [
                Entry(
                    Event(EventKind.SUBSCRIPTION_CHANGED, now, "benchmark"),
                    1 + (second * PER_SECOND + tenth * 10 + n) % 1_000,
                )
                for n in range(PER_SECOND // 10)
            ]
            history.write(connection, entries)
        time.sleep(max(0, 0.1 - (time.monotonic() - began)))


@dataclass(frozen=True)
class Setup:
    """Where two endpoints that want everything are sent to from."""

    words: str
    endpoints: int = 2
    by: tuple[str, ...] = ()  # options of the workers that charge
    own_process: bool = False  # webhooks have one, of the lowest priority


SETUPS = (
    Setup("no endpoint", endpoints=0),
    Setup("sent by the workers that charge"),
    Setup("sent by a process that gives way", by=("-X", "billing.webhooks"), own_process=True),
)


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("rounds", [5])
def test_charges_per_second_with_and_without_two_endpoints(postgres, tmp_path, rounds):
    """Short rounds in turn, forwards and backwards, so that a slow minute falls on all setups."""
    rates = {setup: [] for setup in SETUPS}
    for number in range(rounds):
        for setup in SETUPS if number % 2 else reversed(SETUPS):
            folder = tmp_path / f"{number}-{SETUPS.index(setup)}"
            folder.mkdir()
            rates[setup].append(_charging_rate(postgres, folder, setup))
    print(f"\n{SHORT_ROUND} charges a round, {rounds} rounds, {PROCESSES} workers, medians, "
          f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
    for setup, found in rates.items():
        ratios = [one / bare for bare, one in zip(rates[SETUPS[0]], found, strict=True)]
        print(f"  {setup.words:34s} {median(found):6.1f}/s, ratio {median(ratios):.2f} "
              f"(from {min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


def _charging_rate(postgres, folder, setup):
    with ExitStack() as stack:
        database = stack.enter_context(postgres.temporary_database(template="template_billing"))
        store = stack.enter_context(Store(database))
        redis = stack.enter_context(RedisServer(folder / "redis"))
        gateway = stack.enter_context(sandbox(folder, 0))
        for number in range(setup.endpoints):
            url = stack.enter_context(fast_receiver(folder))
            _outbound(store, f"{url}{number}")
        subscribe_many(store, SHORT_ROUND)
        settings = _settings(database, redis.url) | {
            "BILLING_GATEWAY_URL": f"{gateway}/api",
            "BILLING_CARDGATE_URL": gateway,
            "BILLING_GATEWAY_USERNAME": "sandbox",
            "BILLING_GATEWAY_PASSWORD": "sandbox",
            "BILLING_RENEW_EVERY_SECONDS": "1",
            "BILLING_CHARGE_CONCURRENCY": "16",
        }
        for number in range(PROCESSES):
            stack.enter_context(worker(settings, folder, f"worker-{number}", *setup.by))
        if setup.own_process:
            _give_way(
                stack.enter_context(worker(settings, folder, "webhooks", "-Q", "billing.webhooks"))
            )
        stack.enter_context(beat(settings, folder))
        eventually(lambda: settled(store) == SHORT_ROUND, 300, why="all paid")
        with store.reading() as connection:
            span = select(func.min(attempts.c.created_at), func.max(attempts.c.settled_at))
            begun, ended = connection.execute(span).one()
    return SHORT_ROUND / (ended - begun).total_seconds()
