"""Real parts: PostgreSQL, a Redis-compatible server, worker and beat processes, real sockets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from billing_worker.clock import SystemClock
from billing_worker.domain.secret import Secret
from billing_worker.persistence.book import identity
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer
from billing_worker.services.reports import status
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.records import monthly
from tests.support.redis_server import RedisServer
from tests.support.world import KEY


class Installation:
    """Everything but the workers: those each test starts, kills and stops as it likes."""

    def __init__(self, url, redis, sandbox, server, folder):
        self.store = Store(url)
        self.redis = redis
        self.sandbox = sandbox
        self.folder = folder
        self.settings = {
            "BILLING_DATABASE_URL": url,
            "BILLING_REDIS_URL": redis.url,
            "BILLING_GATEWAY_URL": f"{server.url}/api",
            "BILLING_CARDGATE_URL": server.url,
            "BILLING_GATEWAY_USERNAME": sandbox.username,
            "BILLING_GATEWAY_PASSWORD": sandbox.password,
            "BILLING_TEST_MODE": "true",
            "BILLING_VAULT_KEYS": KEY,
            "BILLING_GATEWAY_TIMEOUT_SECONDS": "5",
            "BILLING_RENEW_EVERY_SECONDS": "1",
            "BILLING_RECONCILE_EVERY_SECONDS": "1",
            "BILLING_RECONCILE_AFTER_SECONDS": "1",
            "BILLING_STUCK_AFTER_SECONDS": "1",
            "BILLING_EXPIRY_GRACE_SECONDS": "1",
            "BILLING_NOT_CHARGED_RETRY_SECONDS": "1",
            "BILLING_EXPIRED_RETRY_SECONDS": "1",
        }

    def subscribe(self, token="approved", count=1):
        anchor = datetime.now(UTC) - timedelta(minutes=1)  # noqa: TID251 - real time
        records = [monthly(number, token, anchor) for number in range(1, count + 1)]
        subscribe(self.store, FernetVault(Secret(KEY)), SystemClock(), records, by="test")

    def explain(self, reference="sub-1-p0"):
        with self.store.reading() as connection:
            return status.explain(connection, reference)

    def fates(self):
        with self.store.reading() as connection:
            lines = status.status(connection, SystemClock().now())["invoices"]
        return {line["fate"]: line["count"] for line in lines}

    def paid(self):
        return self.fates().get("paid", 0)

    def debits_per_invoice(self):
        with self.store.reading() as connection:
            prefix = identity.read(connection).prefix
        counts = {}
        for debit in self.sandbox.ledger:
            invoice = debit.reference_id.removeprefix(prefix).rpartition("-a")[0]
            counts[invoice] = counts.get(invoice, 0) + 1
        return counts


@pytest.fixture
def redis(tmp_path):
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def installation(postgres_url, redis, tmp_path):
    sandbox = SandboxGateway(Behaviour(second_sale="charge", slow_seconds=3), SystemClock().now)
    with SandboxServer(sandbox) as server:
        installation = Installation(postgres_url, redis, sandbox, server, tmp_path)
        yield installation
        installation.store.close()
