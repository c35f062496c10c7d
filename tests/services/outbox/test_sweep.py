"""What the beat does: nothing is told twice under one number, by a copy, or too early to be kept."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import func, select

from billing_worker.persistence.outbox import feed
from billing_worker.persistence.schema import outgoing
from billing_worker.persistence.store import Store
from billing_worker.services.outbox import relay as relaying
from billing_worker.services.outbox.publish import publish
from billing_worker.services.outbox.relay import relay
from billing_worker.services.outbox.retention import forget
from billing_worker.services.outbox.sweep import tell
from tests.support.backup import backup, restore
from tests.support.receivers import add, send
from tests.support.world import World

DAY = timedelta(days=1)


def beat(world, send=None):
    """One beat of a worker whose database server is known by now."""
    tell(world.ports, lambda: None, None)
    woken = []
    published = tell(world.ports, lambda: woken.append(1), send)
    return published, bool(woken)


def numbers(world, after=0):
    with world.store.reading() as connection:
        return [row.number for row in feed.after(connection, after, 1_000)]


def test_after_a_restore_a_reader_misses_nothing_that_is_told_then(world, listener):
    world.subscribe(interval="day")
    world.tick()
    beat(world)
    kept = backup(world.store)
    world.clock.advance(DAY)
    world.tick()
    beat(world)
    [*_, newest] = listener.bodies()
    restore(world.store, kept)
    assert tell(world.ports, lambda: None, None) == 0  # the loss is noticed first
    world.subscribe(reference="sub-2")
    beat(world)
    told = listener.bodies(after=newest["data"]["number"])
    assert {"sub-2"} <= {one["data"]["subscription"] for one in told}
    of_one = [one["data"] for one in listener.bodies() if one["data"]["subscription"] == "sub-2"]
    assert min(one["sequence"] for one in of_one) > newest["data"]["sequence"]
    assert numbers(world) == sorted(set(numbers(world)))
    world.run_for(2 * DAY, step=timedelta(hours=3))  # what was forgotten is found at the gateway


def test_a_copy_of_a_database_tells_nothing(postgres, postgres_url):
    original = postgres_url.rpartition("/")[2]
    with Store(postgres_url) as store:
        world = World(store)
        world.subscribe()
        world.tick()
        beat(world)
        assert numbers(world) == [1, 2, 3, 4]
    with postgres.temporary_database(template=original) as url, Store(url) as copy:
        world.store, world.outside = copy, ()
        world.ports = world.ports_of_a_worker()
        world.subscribe(reference="sub-2")
        assert [beat(world) for _ in range(3)] == [(0, False)] * 3


class Broker:
    def __init__(self):
        self.events = []
        self.away_after = None

    def __call__(self, event):
        if self.away_after is not None and len(self.events) >= self.away_after:
            return False
        self.events.append(event)
        return True

    @property
    def numbers(self):
        return [event["data"]["number"] for event in self.events]


@pytest.fixture
def broker():
    return Broker()


def test_the_queue_gets_each_event_in_order_from_the_moment_it_is_set_up(
    world, broker, monkeypatch
):
    monkeypatch.setattr(relaying, "RELAY_BATCH", 2)
    world.subscribe(reference="sub-0")
    beat(world)
    beat(world, broker)
    assert broker.events == []
    for number in range(1, 6):
        world.subscribe(reference=f"sub-{number}")
    beat(world, broker)
    assert broker.numbers == [2, 3, 4, 5, 6]
    beat(world, broker)
    assert broker.numbers == [2, 3, 4, 5, 6]


def test_a_broker_that_goes_away_gets_the_rest_later(world, broker):
    beat(world, broker)
    for number in range(5):
        world.subscribe(reference=f"sub-{number}")
    broker.away_after = 2
    beat(world, broker)
    broker.away_after = None
    beat(world, broker)
    assert broker.numbers == [1, 2, 3, 4, 5]


def test_a_process_that_dies_while_it_sends_leaves_its_batch_to_the_next(world, broker):
    beat(world, broker)
    world.subscribe()
    publish(world.store, world.clock)

    def dies(event):
        broker(event)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relay(world.store, world.clock, dies)
    assert relay(world.store, world.clock, broker) == 0  # its lease has not run out
    world.clock.advance(relaying.RELAY_LEASE)
    relay(world.store, world.clock, broker)
    assert broker.numbers == [1, 1]


def test_old_events_are_deleted_but_none_that_has_still_to_be_sent(world, out, receivers):
    add(world)
    receivers.stuck = "sub-1"
    for name in ("sub-1", "sub-2"):
        world.subscribe(reference=name)
    world.tick()
    send(out)
    world.clock.advance(40 * DAY)
    assert forget(world.store, world.clock, None) == 0
    assert forget(world.store, world.clock, 60 * DAY) == 0
    assert forget(world.store, world.clock, 30 * DAY) == 4  # those of sub-2
    receivers.stuck = None
    send(out)
    assert receivers.sequences()["sub-1"] == [1, 2, 3, 4]
    assert forget(world.store, world.clock, 30 * DAY) == 4
    with world.store.reading() as connection:
        assert feed.forgotten(connection) == 8
        left = connection.execute(select(func.count()).select_from(outgoing.deliveries)).scalar()
    assert left == 0
    world.subscribe(reference="sub-3")
    publish(world.store, world.clock)
    assert numbers(world) == [9]


def test_what_the_queue_has_still_to_be_sent_is_kept(world, broker):
    beat(world, broker)
    world.subscribe()
    publish(world.store, world.clock)
    world.clock.advance(40 * DAY)
    assert forget(world.store, world.clock, 30 * DAY) == 0
    relay(world.store, world.clock, broker)
    assert forget(world.store, world.clock, 30 * DAY) == 1
