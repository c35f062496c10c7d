"""The real storm: real workers, beats, servers and signals, then calm, and ledger against books.

The quick form is one seed. The long form, `pytest -m long -n 0 -s tests/acceptance/test_storm.py`,
takes STORM_SEEDS seeds (20) from STORM_FIRST_SEED (1000) on.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy import update

from billing_worker.clock import SystemClock
from billing_worker.persistence.schema import tables
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer
from billing_worker.services.reports import status
from tests.acceptance.conftest import Installation
from tests.support.books import name_book
from tests.support.postgres import EmbeddedPostgres
from tests.support.processes import Process, beat, eventually, worker
from tests.support.redis_server import RedisServer
from tests.support.replication import ReplicatedPostgres
from tests.support.storm import STARTS_WITHIN, Storm
from tests.support.weather import KINDS, RARER_KINDS, forecast

ACK_LOSES_REDIS = Path(__file__).parents[1] / "support" / "ack_loses_redis.py"
KILLS = {
    "worker killed",
    "beat killed",
    "redis killed",
    "redis lost",
    "postgres crashed",
    "postgres restarted",
    "postgres fails over",
    "wrong vault key",
}


@pytest.fixture(scope="module")
def own_postgres():
    """Not the server of the other tests: this one crashes."""
    with EmbeddedPostgres() as server:
        server.create_database("template_storm")
        store = Store(server.url("template_storm"))
        migrate(store)
        store.close()
        yield server


@pytest.fixture(scope="module")
def own_pair():
    """A primary and its standby, which take turns."""
    with ReplicatedPostgres() as pair:
        store = Store(pair.create_database("template_storm"))
        migrate(store)
        store.close()
        yield pair


@pytest.fixture
def storm_of(tmp_path):
    """Build, run and judge the storm of a seed; every process of it ends with the test."""

    def run(seed, postgres, weather, *, subscriptions, seconds, others=0):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        with ExitStack() as stack:
            redis = stack.enter_context(RedisServer(folder / "redis"))
            url = stack.enter_context(postgres.temporary_database(template="template_storm"))
            storm = stack.enter_context(closing(Storm(seed, folder, postgres, url, redis)))
            storms = [storm]
            if others:
                (folder / "other").mkdir()
                url = stack.enter_context(postgres.temporary_database(template="template_storm"))
                other = Storm(-seed, folder / "other", postgres, url, redis, beside=storm)
                storms.append(stack.enter_context(closing(other)))
                name_book(other.store, identity="thebookofanother")
                other.gather(others, seconds)
            try:
                storm.gather(subscriptions, seconds)
                storm.rage(weather)
                books = [judged(one) for one in storms]
                unpaid = sum(book.unpaid_by_the_weather for book in books)
                assert unpaid <= subscriptions // 20
                # The two books have equal references as far as the second one has any.
                assert max(book.stopped_by_another_book for book in books) <= others
            except BaseException as error:
                error.add_note("\n".join(storm.log))
                raise
        return storm, *books

    return run


def judged(storm):
    storm.calm()
    storm.kill_everybody()
    books = storm.reckon()
    assert not books.violations, evidence(storm, books)
    return books


def evidence(storm, books):
    """Everything that is needed to find the cause; the logs are in the folder."""
    ledger = storm.gateway.read("ledger")["debits"]
    told = [f"seed {storm.seed}, logs in {storm.folder}", *books.violations]
    with storm.store.reading() as connection:
        for reference in sorted(books.suspects)[:3]:
            told.append(json.dumps(status.explain(connection, reference), indent=1))
            told += [str(debit) for debit in ledger if reference in debit["reference_id"]]
    (storm.folder / "evidence.txt").write_text("\n".join(told))
    return "\n".join(told)


def test_the_same_seed_forecasts_the_same_weather():
    assert forecast(7, 30) == forecast(7, 30)
    assert forecast(7, 30) != forecast(8, 30)


@pytest.mark.again
@pytest.mark.timeout(600)  # waits for conditions, on a machine that may be busy; about 30 s
def test_a_storm_charges_nobody_twice_and_loses_nothing(storm_of, own_postgres):
    weather = forecast(7, len(KINDS))
    storm, books = storm_of(7, own_postgres, weather, subscriptions=120, seconds=6)
    print(f"\nseed {storm.seed}: {dict(storm.gusts)}; {books.figures()}")
    assert set(storm.gusts) == set(KINDS)
    assert books.debits > 100


@pytest.mark.long
@pytest.mark.timeout(0)
def test_storms_of_many_seeds_charge_nobody_twice_and_lose_nothing(storm_of, own_pair):
    first = int(os.environ.get("STORM_FIRST_SEED", "1000"))
    gusts, debits, takeovers = Counter(), 0, 0
    for seed in range(first, first + int(os.environ.get("STORM_SEEDS", "20"))):
        weather = forecast(seed, 30, KINDS + RARER_KINDS)
        storm, *books = storm_of(seed, own_pair, weather, subscriptions=500, seconds=22, others=60)
        gusts += storm.gusts
        debits += sum(book.debits for book in books)
        takeovers += sum(book.takeovers for book in books)
        killed = sum(count for kind, count in storm.gusts.items() if kind in KILLS)
        figures = " | the other book: ".join(book.figures() for book in books)
        print(f"seed {seed}: {killed} killed; {figures}", flush=True)
    print(f"{debits} debits, {takeovers} attempts taken over, weather: {dict(gusts)}")


@pytest.mark.again
@pytest.mark.timeout(300)
def test_a_message_in_hand_when_redis_dies_does_not_end_the_worker(installation):
    """Found by seed 2007. What could not be acknowledged must not be put back: if the connection
    was being polled when it broke, kombu has closed it by then, and the AttributeError ended the
    worker.
    """
    installation.subscribe(count=10)
    settings = installation.settings | {"ACK_KILLS": str(installation.redis.pid)}
    options = ["-A", "billing_worker", "worker", "-n", "unlucky@test", "--without-gossip"]
    command = [sys.executable, str(ACK_LOSES_REDIS), *options, "--without-mingle", "-l", "INFO"]
    process = Process(command, settings, installation.folder / "unlucky.log")
    try:
        with beat(installation.settings, installation.folder):
            eventually(lambda: not installation.redis.running, STARTS_WITHIN, why="Redis dies")
            lost = "Couldn't ack"
            eventually(lambda: lost in process.output, STARTS_WITHIN, why="an ack is lost")
            installation.redis.start()
            eventually(
                lambda: process.status is not None or installation.paid() == 10,
                STARTS_WITHIN,
                why="10 paid",
            )
            assert process.status is None, process.output[-3000:]
            assert process.terminate() == 0
    finally:
        process.kill()
    assert "Restoring 1 unacknowledged" not in process.output
    assert installation.debits_per_invoice() == {f"sub-{n}-p0": 1 for n in range(1, 11)}


@pytest.fixture
def on_sqlite(sqlite_url, tmp_path):
    behaviour = Behaviour(second_sale="charge", lifetime_seconds=3, latency_seconds=0.15)
    sandbox = SandboxGateway(behaviour, SystemClock().now)
    with RedisServer(tmp_path / "redis") as redis, SandboxServer(sandbox) as server:
        installation = Installation(sqlite_url, redis, sandbox, server, tmp_path)
        yield installation
        installation.store.close()


def interrupted(process):
    return process.output.count('"charge.interrupted"')


def a_minute_passes(installation):
    """A message whose claim was interrupted is missed after a minute."""
    with installation.store.transaction() as connection:
        rung = update(tables.invoices).where(tables.invoices.c.enqueue_at.is_not(None))
        connection.execute(rung.values(enqueue_at=SystemClock().now()))


@pytest.mark.again
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process that runs")
@pytest.mark.timeout(300)
def test_a_disk_that_is_full_in_the_middle_of_charging_costs_time_and_no_money(on_sqlite):
    """The worker may not make its files longer: each write past that fails, as on a full disk."""
    everybody = 100
    on_sqlite.subscribe(count=everybody)
    log = on_sqlite.folder / "billing.db-wal"
    with worker(on_sqlite.settings, on_sqlite.folder) as process, \
            beat(on_sqlite.settings, on_sqlite.folder):  # fmt: skip
        eventually(lambda: on_sqlite.paid() >= 5, STARTS_WITHIN, why="some are paid")
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
        eventually(lambda: interrupted(process) >= 3, STARTS_WITHIN, why="charges are interrupted")
        paid = on_sqlite.paid()
        assert paid < everybody
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        a_minute_passes(on_sqlite)
        eventually(lambda: on_sqlite.paid() == everybody, STARTS_WITHIN, why="all are paid")
        assert process.terminate() == 0
    assert on_sqlite.debits_per_invoice() == {f"sub-{n}-p0": 1 for n in range(1, everybody + 1)}
    attempts = [
        attempt
        for invoice in on_sqlite.debits_per_invoice()
        for attempt in on_sqlite.explain(invoice)["attempts"]
    ]
    of_reference = on_sqlite.sandbox.requests.for_reference
    sold = {a["reference_id"]: of_reference("sale", a["reference_id"]) for a in attempts}
    assert max(sold.values()) == 1
    # A sale whose commit failed would be found at the gateway, and nobody would see the mistake.
    assert [a for a in attempts if sold[a["reference_id"]] and not a["submitted_at"]] == []
    print(f"\ndisk full after {paid} of {everybody}: {interrupted(process)} charges interrupted")
