from __future__ import annotations

import json
from datetime import timedelta

import pytest

from billing_worker.domain.outgoing.webhooks import USUAL_WAITS
from billing_worker.persistence.outbox import feed
from billing_worker.services.outbox.deliver import Outbound
from billing_worker.services.outbox.publish import publish
from tests.support.receivers import Receivers

DAY = timedelta(days=1)


class Listener:
    """Reads the feed of a world as another system does."""

    def __init__(self, world):
        self._world = world

    def bodies(self, after=0, limit=10_000):
        publish(self._world.store, self._world.clock)
        with self._world.store.reading() as connection:
            return [json.loads(row.body) for row in feed.after(connection, after, limit)]

    def types(self, subscription="sub-1"):
        return [b["type"] for b in self.bodies() if b["data"]["subscription"] == subscription]


@pytest.fixture
def listener(world):
    return Listener(world)


@pytest.fixture
def receivers():
    return Receivers()


@pytest.fixture
def out(world, receivers):
    return Outbound(world.store, world.clock, world.vault, receivers, USUAL_WAITS)
