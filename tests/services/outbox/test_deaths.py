"""A process that dies at any step of a delivery: nothing is lost, nothing overtakes anything.

Every boundary is crossed in turn: the beginning and the end of each transaction, before and after it
takes effect, and each request, before it leaves and after it was answered.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.persistence.store import Store
from billing_worker.services.outbox import deliver as delivering
from billing_worker.services.outbox.deliver import deliver
from billing_worker.services.outbox.publish import publish
from tests.support.receivers import SHOP, AtOnce, add, send

DAY = timedelta(days=1)
MOST_CROSSINGS = 40


class Died(BaseException):
    """SIGKILL: what is not committed is lost, and so is what the process knew."""


class Mortal:
    """A store and a wire that end the process at the crossing with this number."""

    def __init__(self, world, receivers, dies_at):
        self._begin = world.store.transaction
        self._receivers = receivers
        self._dies_at = dies_at
        self.crossed = 0

    def cross(self):
        self.crossed += 1
        if self.crossed == self._dies_at:
            raise Died

    @contextmanager
    def transaction(self):
        self.cross()
        with self._begin() as connection:
            yield connection
            self.cross()
        self.cross()

    def post(self, *request):
        self.cross()
        answer = self._receivers(*request)
        self.cross()
        return answer


@pytest.fixture
def life(world, receivers, out, monkeypatch):
    """Lives until that crossing. Returns whether it came so far."""

    def live(work, dies_at):
        mortal = Mortal(world, receivers, dies_at)
        with monkeypatch.context() as patch, suppress(Died):
            patch.setattr(Store, "transaction", lambda _store: mortal.transaction())
            work(replace(out, post=mortal.post))
        return mortal.crossed >= dies_at

    return live


def a_day_later(world):
    world.clock.advance(DAY)
    world.tick()


def in_order_and_complete(receivers, subscriptions):
    found = receivers.sequences()
    assert set(found) == set(subscriptions)
    for seen in found.values():
        assert seen == list(range(1, len(seen) + 1))
    raw = [e["data"] for e in receivers.taken[SHOP]]
    for name in subscriptions:
        whole = [one["sequence"] for one in raw if one["subscription"] == name]
        assert whole == sorted(whole)  # repetitions, too, come before anything newer


def test_a_sender_that_dies_at_any_crossing_loses_nothing_and_reorders_nothing(
    world, out, receivers, life
):
    add(world)
    for name in ("sub-1", "sub-2"):
        world.subscribe(reference=name, interval="day")
    for dies_at in range(1, MOST_CROSSINGS):
        a_day_later(world)
        publish(world.store, world.clock)
        reached = life(lambda mortal: deliver(mortal, 1, AtOnce()), dies_at)
        world.clock.advance(2 * delivering.LEASE)
        send(out)
        if not reached:
            break
    else:
        pytest.fail("the loop ended before every crossing was tried")
    in_order_and_complete(receivers, ("sub-1", "sub-2"))


def test_a_publisher_that_dies_at_any_crossing_numbers_every_fact_once(world, out, receivers, life):
    add(world)
    world.subscribe(reference="sub-1", interval="day")
    for dies_at in range(1, MOST_CROSSINGS):
        a_day_later(world)
        reached = life(lambda mortal: publish(mortal.store, mortal.clock), dies_at)
        send(out)
        if not reached:
            break
    numbers = [event["data"]["number"] for event in receivers.taken[SHOP]]
    assert numbers == list(range(1, len(numbers) + 1))
    in_order_and_complete(receivers, ("sub-1",))
