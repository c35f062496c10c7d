"""Real workers on PostgreSQL and Redis, killed with SIGKILL at the ten most dangerous boundaries."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from billing_worker.clock import SystemClock
from billing_worker.entrypoints.worker.doorbell import SWEEPS, doorbell_only
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer
from tests.acceptance.conftest import Installation
from tests.support.processes import Process, eventually, worker
from tests.support.redis_server import RedisServer

LAUNCHER = Path(__file__).with_name("killing_worker.py")

BEFORE_THE_SALE = (
    "commit of renew: after",
    "commit of claim: after",
    "create: before effect",
    "create: after effect",
    "commit of submit: before",
)
AROUND_THE_SALE = (
    "commit of submit: after",
    "sale: before effect",
    "sale: after effect",
    "commit of settle: before",
    "commit of settle: after",
)


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def installation(postgres_url, redis, tmp_path):
    redis.wipe()
    # An invoice that is never sold expires soon; one that is sold twice is charged twice.
    behaviour = Behaviour(second_sale="charge", lifetime_seconds=6)
    sandbox = SandboxGateway(behaviour, SystemClock().now)
    with SandboxServer(sandbox) as server:
        installation = Installation(postgres_url, redis, sandbox, server, tmp_path)
        yield installation
        installation.store.close()


@contextmanager
def ticks(url):
    """What a beat sends, without the seconds that a beat takes to start."""
    app = doorbell_only(url)
    over = threading.Event()

    def ring():
        while not over.wait(0.3):
            for task in ("billing.renew", "billing.ring", "billing.reconcile"):
                app.send_task(task, queue=SWEEPS, expires=3)

    thread = threading.Thread(target=ring)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        app.close()


def killing_worker(installation, boundary):
    command = [sys.executable, str(LAUNCHER), "-A", "billing_worker", "worker", "-n", "doomed@test"]
    settings = installation.settings | {"FAULT_KILL_AT": boundary}
    options = ["--without-gossip", "--without-mingle"]
    return Process([*command, *options], settings, installation.folder / "doomed.log")


def a_minute_passes(installation):
    """Messages that a dead process did not send are missed after a minute."""
    with installation.store.transaction() as connection:
        connection.execute(
            text("UPDATE invoices SET enqueue_at = enqueue_at - interval '1 minute'")
        )


@pytest.mark.timeout(300)  # eleven starts of a worker, maybe on a busy machine
@pytest.mark.parametrize("boundaries", [
    pytest.param(BEFORE_THE_SALE, id="before the sale", marks=pytest.mark.again),
    pytest.param(AROUND_THE_SALE, id="around the sale"),
])  # fmt: skip
def test_real_workers_that_are_killed_one_after_another_charge_everybody_once(
    installation, boundaries
):
    """Each finds what its predecessor left, gets a charge of its own, and dies in its turn."""
    with ticks(installation.redis.url):
        for count, boundary in enumerate(boundaries, 1):
            installation.subscribe(count=count)
            doomed = killing_worker(installation, boundary)
            try:
                assert doomed.wait(60) == -signal.SIGKILL, f"never came to {boundary}"
            finally:
                doomed.kill()
            a_minute_passes(installation)
        with worker(installation.settings, installation.folder, "survivor"):
            everybody = len(boundaries)
            eventually(lambda: installation.paid() == everybody, 60, why="all paid")
    debits = installation.debits_per_invoice()
    assert debits == {f"sub-{number}-p0": 1 for number in range(1, everybody + 1)}
    sales = [
        installation.sandbox.requests.for_reference("sale", attempt["reference_id"])
        for invoice in debits
        for attempt in installation.explain(invoice)["attempts"]
    ]
    assert max(sales) == 1
    print(f"\n{everybody} workers killed; charged twice: 0, lost: 0")
