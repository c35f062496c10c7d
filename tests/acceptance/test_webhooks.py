"""Real workers send to a real receiver that verifies with the reference library."""

from __future__ import annotations

import random
import signal

import pytest
from sqlalchemy import text

from billing_worker.clock import SystemClock
from billing_worker.domain.secret import Secret
from billing_worker.persistence.outbox import feed
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.outbox import endpoints
from tests.support.processes import beat, eventually, worker
from tests.support.receiver_server import ReceiverServer
from tests.support.world import KEY

pytestmark = [pytest.mark.again, pytest.mark.timeout(180)]

COUNT = 20


@pytest.fixture
def receiver(installation):
    installation.settings |= {
        "BILLING_WEBHOOKS_ALLOW_PRIVATE": "true",
        "BILLING_WEBHOOKS_SCHEDULE_SECONDS": ",".join(["0", *["1"] * 40]),
    }
    with ReceiverServer().listening() as receiver:
        added = endpoints.add(
            installation.store, FernetVault(Secret(KEY)), SystemClock(),
            url=receiver.url, types=None, allow_private=True,
        )  # fmt: skip
        receiver.secret = added.secret.reveal()
        yield receiver


def complete(installation, receiver):
    with installation.store.reading() as connection:
        newest = feed.newest(connection)
    return newest >= 4 * COUNT and len({event["id"] for event in receiver.taken}) == newest


def cut_every_connection(installation):
    """The database as its clients see it when it dies: whatever was not committed is gone."""
    ours = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with installation.store.transaction() as connection:
        connection.execute(ours)


def test_a_receiver_that_fails_half_of_the_time_gets_all_in_order_whatever_is_killed(
    installation, receiver
):
    chance = random.Random(7)
    receiver.status = lambda _: 200 if chance.random() < 0.5 else 500
    installation.subscribe(count=COUNT)
    with beat(installation.settings, installation.folder):
        with worker(installation.settings, installation.folder, "killed") as doomed:
            eventually(lambda: len(receiver.taken) > COUNT, 60, why="some are taken")
            doomed.signal(signal.SIGKILL)
            doomed.wait()
        installation.redis.wipe()
    with (
        beat(installation.settings, installation.folder, "another-beat"),
        worker(installation.settings, installation.folder, "survivor"),
    ):
        eventually(lambda: len(receiver.taken) > 2 * COUNT, 60, why="more are taken")
        cut_every_connection(installation)
        eventually(lambda: installation.paid() == COUNT, 60, why="all paid")
        eventually(lambda: complete(installation, receiver), 120, why="all are taken")
    assert receiver.refused == 0
    found = receiver.sequences()
    assert len(found) == COUNT
    assert all(seen == list(range(1, len(seen) + 1)) for seen in found.values())
    last = {event["data"]["subscription"]: event for event in receiver.taken}
    assert {one["data"]["state"]["invoice"]["status"] for one in last.values()} == {"paid"}
