"""A book that has forgotten what it committed notices it, and sells nothing a second time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import timedelta

import pytest
import redis
from redis.exceptions import RedisError
from sqlalchemy import select
from structlog.testing import capture_logs

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence import switches
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.book import outside_redis
from billing_worker.persistence.book.identity import Server
from billing_worker.persistence.book.outside_redis import RedisRecord
from billing_worker.persistence.rows import attempt_from
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.schema.tables import attempts, events
from billing_worker.persistence.store import Store
from billing_worker.services import kill_switch
from billing_worker.services.attempts.claim import claim
from billing_worker.services.charging.charge import charge
from billing_worker.services.guards import lost_memory
from tests.support.backup import backup, restore
from tests.support.books import name_book
from tests.support.redis_server import RedisServer
from tests.support.replication import ReplicatedPostgres
from tests.support.world import World

pytestmark = pytest.mark.sql

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def other(world, sqlite_template, tmp_path):
    """Another book on the account of `world`."""
    path = tmp_path / "other.db"
    shutil.copy(sqlite_template, path)
    with Store(f"sqlite:///{path}") as store:
        name_book(store, identity="thebookofanother")
        yield World(store, beside=world)


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushdb()
        yield client


def alerts(world, kind):
    with world.store.reading() as connection:
        query = select(events.c.data).where(events.c.kind == kind, events.c.alert)
        return [data["reason"] for data in connection.execute(query).scalars()]


def restored_at(world):
    with world.store.reading() as connection:
        return switches.read(connection).restored_at


def slow(world):
    """Sales are acknowledged as pending, and charged an hour later: before it, nothing is to see."""
    world.sandbox.behaviour = replace(world.sandbox.behaviour, later_seconds=4000)
    world.subscribe("approved_later")


def lose_submitted(world):
    """Sell, and then let the database forget it: the row says `prepared` again."""
    kept = []

    def keep(request):
        if request.method == "POST" and not kept:
            kept.append(backup(world.store))

    world.transport.before_send = keep
    world.tick()
    assert world.attempts() == ["submitted"]
    restore(world.store, kept[0])
    world.bell.messages.clear()
    assert world.attempts() == ["prepared"]


# --- the newest sale is recorded outside ------------------------------------------------------


def test_a_pending_sale_whose_commit_is_lost_is_not_sold_again(world):
    slow(world)
    lose_submitted(world)
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert world.sales("sub-1-p0-a1") == 1
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"
    assert ["sub-1-p0-a1" in reason for reason in alerts(world, "book.forgot")] == [True]


def test_a_pending_sale_is_not_sold_again_when_the_record_outside_is_lost_too(world):
    slow(world)
    lose_submitted(world)
    world.outside[0].known = None
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert world.sales("sub-1-p0-a1") == 1
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"


@pytest.mark.parametrize("lost_before_it_is_recorded", [False, True])
def test_a_loss_whose_own_notice_is_lost_is_noticed_again(world, lost_before_it_is_recorded):
    world.subscribe("approved", "sub-0")
    world.tick()
    world.clock.advance(MINUTE)
    slow(world)
    kept = backup(world.store)
    world.tick()
    restore(world.store, kept)
    world.bell.messages.clear()
    world.clock.advance(MINUTE)
    keeper = world.outside[0]
    begin = keeper.begin

    def begin_after_a_loss(record):
        restore(world.store, kept)
        keeper.begin = begin
        begin(record)

    if lost_before_it_is_recorded:
        keeper.begin = begin_after_a_loss
    lost_memory.poll(world.ports)
    restore(world.store, kept)
    world.clock.advance(MINUTE)
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert world.sales("sub-1-p0-a1") == 1
    assert world.debits() == {"sub-0-p0": 1, "sub-1-p0": 1}
    assert world.fate() == "paid"
    assert "a loss of memory that was noticed" in alerts(world, "book.forgot")[0]


def test_a_charge_that_the_books_have_never_heard_of_is_found_without_anybody_saying_so(world):
    world.subscribe("approved")
    kept = backup(world.store)
    world.tick()
    assert world.fate() == "paid"
    restore(world.store, kept)
    world.clock.advance(MINUTE)
    world.run_for(HOUR)
    assert world.sales("sub-1-p0-a1") == 1
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"


def test_a_record_that_has_missed_a_sale_proves_nothing_unsold(store, client, monkeypatch):
    monkeypatch.setattr(outside_redis, "_AWAY_SECONDS", 0.0)
    world, keeper = World(store), RedisRecord(client)
    world.outside = (keeper,)
    world.ports = world.ports_of_a_worker()
    world.subscribe("approved", "sub-0")
    world.tick()
    world.clock.advance(MINUTE)
    slow(world)
    with monkeypatch.context() as patched:
        patched.setattr(keeper, "_client", AwayForSales(client))
        lose_submitted(world)
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert world.sales("sub-1-p0-a1") == 1
    assert world.fate() == "paid"
    (known,) = lost_memory.read_outside(world.ports)
    assert known.begun_at is not None, "it is complete again from then on"
    assert [sale.reference_id for sale in known.sales] == ["sub-0-p0-a1"]


class AwayForSales:
    """A Redis that dies just when a sale is to be recorded."""

    def __init__(self, client):
        self._client = client

    def pipeline(self):
        pipeline = self._client.pipeline()
        pipeline.rpush = self._away
        return pipeline

    def _away(self, *_):
        raise RedisError("away")


def test_books_in_one_redis_keep_a_record_each(world, other, client):
    for one in (world, other):
        one.outside = (RedisRecord(client),)
        one.ports = one.ports_of_a_worker()
    world.subscribe("approved", ends_after_periods=1)
    kept = backup(world.store)
    world.tick()
    other.subscribe("approved", "sub-9", ends_after_periods=1)
    other.tick()
    restore(world.store, kept)
    world.bell.messages.clear()
    world.clock.advance(MINUTE)
    world.run_for(HOUR, step=5 * MINUTE)
    assert world.debits() == {"sub-1-p0": 1}
    assert len(alerts(world, "book.forgot")) == 1
    assert alerts(other, "book.forgot") == []


def test_a_sale_that_another_process_records_late_hides_no_newer_one(world):
    world.subscribe("approved", "sub-0")
    world.tick()
    with world.store.reading() as connection:
        older = attempt_from(connection.execute(select(attempts)).one())
    world.clock.advance(MINUTE)
    slow(world)
    kept = []

    def keep(request):
        if request.method == "POST" and not kept:
            kept.append(backup(world.store))

    world.transport.before_send = keep
    world.tick()
    lost_memory.record(world.ports, world.book, older, None, world.clock.now())
    restore(world.store, kept[0])
    world.bell.messages.clear()
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert world.sales("sub-1-p0-a1") == 1
    assert ["sub-1-p0-a1" in reason for reason in alerts(world, "book.forgot")] == [True]


@pytest.mark.parametrize("refusal", ["422", "409", "429"])
def test_a_forgotten_sale_that_only_the_gateway_remembers_expired_is_waited_for(world, refusal):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, duplicate_create=refusal)
    world.subscribe("late_6h_after_expiry", ends_after_periods=1)
    kept = backup(world.store)
    world.tick()
    restore(world.store, kept)
    world.bell.messages.clear()
    world.outside[0].known = None
    world.clock.advance(2 * HOUR)
    world.run_for(2 * DAY, step=HOUR)
    assert world.debits() == {"sub-1-p0": 1}
    assert world.attempts() == ["succeeded", "not_charged"]
    assert world.fate() == "paid"


def test_a_charge_that_was_claimed_before_the_loss_was_noticed_is_not_submitted(world):
    world.subscribe("approved")
    world.sweep()
    (_, ids), *_ = world.bell.messages
    world.bell.messages.clear()
    (claimed,) = claim(world.ports, ids)
    assert lost_memory.notice(world.ports, "422 duplicate", seen=claimed.restored_at, by="charge")
    assert charge(world.ports, claimed) == "prepared"
    assert world.sales("sub-1-p0-a1") == 0
    assert lost_memory.NOTICED_SINCE in world.explain()["reason"]
    world.run_for(5 * HOUR, step=5 * MINUTE)
    assert world.debits() == {}, "what is found expired may have been sold by the forgotten life"
    world.run_for(3 * DAY, step=HOUR)
    assert world.debits() == {"sub-1-p0": 1}


def test_many_charges_that_notice_one_loss_tell_of_it_once(world):
    assert lost_memory.notice(world.ports, "422 duplicate", seen=None, by="charge")
    first = restored_at(world)
    world.clock.advance(1)
    assert not lost_memory.notice(world.ports, "422 duplicate", seen=None, by="charge")
    assert restored_at(world) == first
    assert len(alerts(world, "book.forgot")) == 1


def test_an_interrupted_charge_of_books_that_forgot_nothing_goes_on_at_once(world, monkeypatch):
    world.subscribe("approved")
    with monkeypatch.context() as patched, capture_logs():
        patched.setattr("billing_worker.services.charging.charge.submit", _end_the_process)
        world.tick()
    assert world.attempts() == ["prepared"]
    world.run_for(10 * MINUTE)
    assert world.fate() == "paid"


def _end_the_process(*_):
    raise RuntimeError("the process ends here")


def test_a_record_that_is_flushed_costs_no_request_and_alerts_nobody(world):
    world.subscribe("approved")
    world.subscribe("approved", "sub-2", anchor_at=(world.clock.now() + HOUR).isoformat())
    world.tick()
    world.outside[0].known = None
    world.clock.advance(HOUR)
    world.transport.sent.clear()
    world.tick()
    assert world.fate("sub-2-p0") == "paid"
    assert [request.method for request in world.transport.sent] == ["POST", "POST", "GET"]
    assert alerts(world, "book.forgot") == []
    assert world.outside[0].known.sales[-1].reference_id == "sub-2-p0-a1"


# --- PostgreSQL ---------------------------------------------------------------------------------


@pytest.mark.again
def test_a_real_fail_over_that_loses_sales_debits_nobody_twice():
    with ReplicatedPostgres() as pair, Store(pair.create_database("books")) as store:
        migrate(store)
        world = World(store)
        world.outside[0].read = lambda _: None  # noticed by the server alone
        slow(world)
        world.subscribe("approved", "sub-2")
        world.subscribe("approved", "sub-0")
        world.tick()
        world.subscribe("approved", "sub-3")
        world.sweep()
        pair.cut_off()
        world.deliver()
        assert world.fate("sub-3-p0") == "paid"
        pair.fail_over()
        world.run_for(3 * HOUR, step=5 * MINUTE)
        assert set(world.debits().values()) == {1}
        assert {world.fate(f"sub-{n}-p0") for n in (0, 1, 2, 3)} == {"paid"}
        assert alerts(world, "book.forgot") == ["fail-over: timeline 1 -> 2"]


def test_the_timeline_and_the_clock_are_read_by_a_role_without_privileges(postgres_url):
    with Store(postgres_url) as store, store.transaction() as connection:
        connection.exec_driver_sql("CREATE ROLE nobody_special")
        connection.exec_driver_sql("GRANT SELECT ON switches, book TO nobody_special")
        connection.exec_driver_sql("SET LOCAL ROLE nobody_special")
        server = switches.read(connection).server
        connection.exec_driver_sql("RESET ROLE")
        connection.exec_driver_sql("DROP OWNED BY nobody_special; DROP ROLE nobody_special")
    assert server.server is not None
    assert server.server.timeline == 1
    assert server.clock is not None


def test_a_role_that_may_not_read_the_server_charges_all_the_same(postgres_url):
    with Store(postgres_url) as store:
        with store.transaction() as connection:
            connection.info["billing_worker.may_read_server"] = False
            assert switches.read(connection).server.server is None
        world = World(store)
        world.subscribe("approved")
        world.tick()
        assert world.fate() == "paid"


def test_an_interrupted_charge_waits_where_nobody_may_read_whether_there_was_a_fail_over(
    postgres_url, monkeypatch
):
    monkeypatch.setattr(books, "_may_read_server", lambda _: False)
    with Store(postgres_url) as store:
        world = World(store)
        world.subscribe("approved")
        with monkeypatch.context() as patched, capture_logs():
            patched.setattr("billing_worker.services.charging.charge.submit", _end_the_process)
            world.tick()
        world.run_for(20 * MINUTE)
        assert world.attempts() == ["prepared"]
        assert world.sales("sub-1-p0-a1") == 0
        assert "nothing proves that it was not sold" in world.explain()["reason"]


def test_a_sale_that_nobody_could_record_and_a_fail_over_has_lost_is_not_made_again(
    postgres_url, client
):
    """Redis was away, and the process that had sold has died before it was back."""
    with Store(postgres_url) as store:
        world = World(store)
        world.outside = (RedisRecord(client),)
        world.ports = world.ports_of_a_worker()
        world.subscribe("approved", "sub-0")
        world.tick()
        world.clock.advance(MINUTE)
        slow(world)
        world.ports = world.ports_of_a_worker(outside=(RedisRecord(AwayForSales(client)),))
        lose_submitted(world)
        with store.transaction() as connection:
            was = books.read(connection)
            before = Server(was.server.identity, was.server.timeline - 1)
            books.remember_server(connection, before, was.server_since)
        world.ports = world.ports_of_a_worker(outside=(RedisRecord(client),))
        world.run_for(3 * HOUR, step=5 * MINUTE)
        assert world.sales("sub-1-p0-a1") == 1
        assert world.debits() == {"sub-0-p0": 1, "sub-1-p0": 1}


def test_a_copy_of_a_database_sells_nothing_until_a_person_says_that_the_original_is_gone(
    postgres, postgres_url
):
    original = postgres_url.rpartition("/")[2]
    with Store(postgres_url) as store:
        world = World(store)
        world.subscribe("approved")
        world.tick()
        assert world.fate() == "paid"
    with postgres.temporary_database(template=original) as url, Store(url) as copy:
        world.store, world.outside = copy, ()
        world.ports = world.ports_of_a_worker()
        world.subscribe("approved", "sub-2")
        world.run_for(HOUR, step=10 * MINUTE)
        assert world.sales("sub-2-p0-a1") == 0
        (said,) = alerts(world, "book.refused")
        assert "this database is a copy" in said
        start = {"on": True, "service": None, "by": "operator:ann", "reason": "r"}
        with pytest.raises(InvalidInput, match="--moved"):
            kill_switch.switch(copy, **start, now=world.clock.now())
        kill_switch.switch(copy, **start, now=world.clock.now(), moved=True)
        assert restored_at(world) == world.clock.now()
        world.run_for(HOUR, step=10 * MINUTE)
        assert world.fate("sub-2-p0") == "paid"
        assert world.sales("sub-2-p0-a1") == 1


def test_an_old_primary_that_comes_back_sells_nothing(postgres_url):
    with Store(postgres_url) as store:
        world = World(store)
        world.subscribe("approved")
        world.tick()
        known = world.outside[0].known
        promoted = {"timeline": known.timeline + 1, "server_since": world.clock.now() + MINUTE}
        world.outside[0].begin(replace(known, **promoted))
        world.clock.advance(HOUR)
        world.subscribe("approved", "sub-2")
        world.run_for(HOUR, step=10 * MINUTE)
        assert world.sales("sub-2-p0-a1") == 0
        (said,) = alerts(world, "book.refused")
        assert "older copy" in said


def test_a_promotion_is_noticed_before_the_claimed_charge_is_submitted(postgres_url):
    with Store(postgres_url) as store:
        world = World(store)
        world.subscribe("approved")
        world.sweep()
        (_, ids), *_ = world.bell.messages
        (claimed,) = claim(world.ports, ids)
        with store.transaction() as connection:
            was = books.read(connection).server
            before = Server(was.identity, was.timeline - 1)
            books.remember_server(connection, before, world.clock.now())
        assert charge(world.ports, claimed) == "prepared"
        assert world.sales("sub-1-p0-a1") == 0
