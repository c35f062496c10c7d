"""Charges per second of real workers, beside a bare `requests` loop of the same calls.

    pytest -m benchmark -s tests/benchmarks

Figures are printed, not asserted: they are about the machine as much as about us. What is asserted
is that every subscription was charged exactly once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import requests
from sqlalchemy import func, select

from billing_worker.clock import SystemClock
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.local.embedded_redis import free_port
from billing_worker.persistence.schema.tables import attempts, invoices
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.processes import CELERY, CLI, Process, clean_environment, eventually, worker
from tests.support.records import monthly
from tests.support.redis_server import RedisServer
from tests.support.world import KEY

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

CHARGES = 1_000
PROCESSES = 2  # as many as the machine has cores


@contextmanager
def sandbox(folder, latency):
    port = free_port()
    process = Process(
        [*CLI, "sandbox", "--port", str(port), "--latency", str(latency), "--json"],
        {}, folder / "sandbox.log",
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: answers(url), why="sandbox listens")
        yield url
    finally:
        process.kill()


def answers(url):
    try:
        return requests.get(f"{url}/_sandbox/ledger", timeout=1).ok
    except requests.ConnectionError:
        return False


def bare_loop(url, threads):
    """PROCESSES loops at once, together CHARGES charges with `threads` in flight."""
    script = str(Path(__file__).parent / "bare_loop.py")
    arguments = [f"{url}/api", url, str(CHARGES // PROCESSES), str(threads // PROCESSES)]
    loops = [
        subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE)
        for _ in range(PROCESSES)
    ]
    figures = [json.loads(loop.communicate()[0]) for loop in loops]
    seconds = max(figure["seconds"] for figure in figures)
    return CHARGES / seconds, sum(f["cpu_seconds"] for f in figures) / CHARGES * 1000


def subscribe_many(store, count=CHARGES):
    anchor = SystemClock().now() - timedelta(minutes=1)
    records = [monthly(number, "approved", anchor) for number in range(count)]
    subscribe(store, FernetVault(Secret(KEY)), SystemClock(), records, by="benchmark")


def settled(store):
    with store.reading() as connection:
        query = select(func.count()).select_from(invoices).where(invoices.c.status == "paid")
        return connection.execute(query).scalar()


class Watch:
    """CPU and memory of processes while they work."""

    def __init__(self, pids):
        self._processes = [psutil.Process(pid) for pid in pids]
        self._before = self._cpu()
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _cpu(self):
        return sum(p.cpu_times().user + p.cpu_times().system for p in self._processes)

    def _sample(self):
        while not self._done.wait(0.05):
            used = max(p.memory_info().rss for p in self._processes)
            self.peak_mb = max(self.peak_mb, used / 2**20)

    def stop(self):
        self._done.set()
        self._thread.join()
        return self._cpu() - self._before


@pytest.mark.parametrize(
    ("latency", "in_flight"), [(0, 32), (1, 200)], ids=["gateway at 0 ms", "gateway at 1 s"]
)
def test_1000_due_subscriptions(postgres, tmp_path, latency, in_flight):
    with ExitStack() as stack:
        url = stack.enter_context(sandbox(tmp_path, latency))
        redis = stack.enter_context(RedisServer(tmp_path / "redis"))
        database = stack.enter_context(postgres.temporary_database(template="template_billing"))
        bare_rate, bare_cpu = bare_loop(url, in_flight)
        settings = {
            "BILLING_DATABASE_URL": database,
            "BILLING_REDIS_URL": redis.url,
            "BILLING_GATEWAY_URL": f"{url}/api",
            "BILLING_CARDGATE_URL": url,
            "BILLING_GATEWAY_USERNAME": "sandbox",
            "BILLING_GATEWAY_PASSWORD": "sandbox",
            "BILLING_TEST_MODE": "true",
            "BILLING_VAULT_KEYS": KEY,
            "BILLING_CHARGE_CONCURRENCY": str(in_flight // PROCESSES),
        }
        store = Store(database)
        subscribe_many(store)
        workers = [
            stack.enter_context(worker(settings, tmp_path, f"worker-{n}")) for n in range(PROCESSES)
        ]
        rest_mb = max(psutil.Process(w.pid).memory_info().rss for w in workers) / 2**20
        watch = Watch([w.pid for w in workers])
        started = time.monotonic()
        subprocess.run(
            [*CELERY, "call", "billing.renew"], check=True, capture_output=True,
            env=clean_environment(settings),
        )  # fmt: skip
        eventually(lambda: settled(store) == CHARGES, 300, why="all paid")
        seconds = time.monotonic() - started
        cpu = watch.stop()
        with store.reading() as connection:
            begun, ended = connection.execute(
                select(func.min(attempts.c.created_at), func.max(attempts.c.settled_at))
            ).one()
        store.close()
        ledger = requests.get(f"{url}/_sandbox/ledger", timeout=10).json()
        report(latency, in_flight, (ended - begun).total_seconds(), cpu, watch, rest_mb,
               bare_rate, bare_cpu, seconds)  # fmt: skip
    ours = [d["reference_id"] for d in ledger["debits"] if d["reference_id"].startswith("sub-")]
    assert sorted(ours) == sorted(f"sub-{n}-p0-a1" for n in range(CHARGES))


def report(latency, in_flight, seconds, cpu, watch, rest_mb, bare_rate, bare_cpu, wall):
    rate = CHARGES / seconds
    bound = in_flight / (3 * latency) if latency else None
    print(f"\n{CHARGES} charges, gateway at {latency} s, {in_flight} in flight, "
          f"{PROCESSES} workers (wall {wall:.1f} s)")  # fmt: skip
    print(f"  worker        {rate:7.1f}/s  {cpu / CHARGES * 1000:5.2f} ms CPU per charge, "
          f"peak {watch.peak_mb:.0f} MB, at rest {rest_mb:.0f} MB")  # fmt: skip
    print(f"  bare requests {bare_rate:7.1f}/s  {bare_cpu:5.2f} ms CPU per charge")
    print(f"  ratio         {rate / bare_rate:7.2f}")
    if bound:
        print(f"  of the bound in flight / time per charge ({bound:.0f}/s): {rate / bound:.2f}")
