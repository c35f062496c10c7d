"""A PostgreSQL primary dies ahead of its standby, and the worker goes on with what is left."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field

import pytest
from sqlalchemy import func, select

from billing_worker.clock import SystemClock
from billing_worker.persistence.schema import tables
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer
from tests.acceptance.conftest import Installation
from tests.support.processes import beat, command, eventually, worker
from tests.support.redis_server import RedisServer
from tests.support.replication import ReplicatedPostgres

pytestmark = [pytest.mark.again, pytest.mark.timeout(300)]

CUSTOMERS = 40
WITHIN = 90.0
"""Seconds for what the worker does. The machine may be busy; whoever waits goes on at once."""

FEW_AT_A_TIME = {"BILLING_CHARGE_CONCURRENCY": "8"}
ALL_AT_ONCE = {"BILLING_CHARGE_CONCURRENCY": str(CUSTOMERS)}


@pytest.fixture
def pair():
    with ReplicatedPostgres() as pair:
        store = Store(pair.create_database("books"))
        migrate(store)
        store.close()
        yield pair


@dataclass
class Case:
    """What the standby has not heard of when the primary dies, and how the gateway behaves."""

    lost: str
    token: str = "approved"
    behaviour: dict[str, object] = field(default_factory=dict)


CASES = {
    "invoices and all after them": Case("invoices"),
    "invoices, where a duplicate is refused": Case(
        "invoices", behaviour={"duplicate_create": "422"}
    ),
    "submitted": Case("submitted"),
    "submitted, while the sale is pending": Case(
        "submitted", "approved_later", {"later_seconds": 12}
    ),
    "submitted, where a duplicate is refused": Case(
        "submitted", behaviour={"duplicate_create": "422"}
    ),
}


class HoldsCreates(SandboxGateway):
    """Answers no create before `goes_on` is set: no sale may come before the standby is cut off."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.goes_on = threading.Event()

    def handle(self, method, target, headers, body):
        reply = super().handle(method, target, headers, body)
        if method == "POST" and "payment-invoices" in target:
            assert self.goes_on.wait(WITHIN)
        return reply


@pytest.fixture
def installation(pair, tmp_path, case):
    behaviour = Behaviour(
        second_sale="charge", latency_seconds=0.3, lifetime_seconds=25, **case.behaviour
    )
    sandbox = HoldsCreates(behaviour, SystemClock().now)
    with RedisServer(tmp_path / "redis") as redis, SandboxServer(sandbox) as server:
        installation = Installation(pair.url("books"), redis, sandbox, server, tmp_path)
        installation.settings |= {"BILLING_EXPIRED_RETRY_SECONDS": "1"}
        yield installation
        installation.store.close()


def prepared(installation):
    with installation.store.reading() as connection:
        attempts = select(func.count()).select_from(tables.attempts)
        return connection.execute(attempts).scalar_one()


def sold(installation):
    return installation.sandbox.requests.as_json()["operations"].get("sale", 0)


def status(installation):
    answer = command("status", "--json", settings=installation.settings)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nobody_is_debited_twice_or_lost_over_a_fail_over_that_forgets(pair, installation, case):
    installation.subscribe(case.token, count=CUSTOMERS)
    pair.catch_up()
    in_flight = FEW_AT_A_TIME if case.lost == "invoices" else ALL_AT_ONCE
    if case.lost == "invoices":
        pair.cut_off()
        installation.sandbox.goes_on.set()
    with worker(installation.settings | in_flight, installation.folder) as process, \
            beat(installation.settings, installation.folder):  # fmt: skip
        if case.lost == "submitted":
            eventually(lambda: prepared(installation) == CUSTOMERS, WITHIN, why="all are prepared")
            pair.cut_off()
            assert sold(installation) == 0
            installation.sandbox.goes_on.set()
        eventually(lambda: sold(installation) >= CUSTOMERS * 3 // 4, WITHIN, why="most are sold")
        pair.kill_primary()
        installation.store.close()
        pair.promote()

        told = eventually(lambda: status(installation)["restored_at"], WITHIN, why="it is noticed")
        eventually(lambda: installation.paid() == CUSTOMERS, WITHIN, why="all are paid")
        assert process.status is None
    debits = installation.debits_per_invoice()
    assert debits == {f"sub-{n}-p0": 1 for n in range(1, CUSTOMERS + 1)}
    assert told
    assert status(installation)["alerts"]
