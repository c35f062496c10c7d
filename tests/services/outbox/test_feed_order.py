"""Whoever reads the feed on from a number misses nothing, in whatever order writers commit."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime

import pytest

from billing_worker.clock import SystemClock
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.outbox import feed
from billing_worker.services.outbox.publish import publish

WRITERS, EACH, READERS, SUBSCRIPTIONS = 8, 25, 20, 5
PAUSE = 0.01
NOW = datetime(2026, 1, 31, tzinfo=UTC)


def write(store, writer):
    chance = random.Random(writer)
    for number in range(EACH):
        event = Event(EventKind.CARD_ADDED, NOW, f"{writer}-{number}")
        with store.transaction() as connection:
            history.write(connection, [Entry(event, chance.randrange(1, SUBSCRIPTIONS + 1))])
            if not store.is_sqlite:  # where writers take turns anyway
                time.sleep(chance.random() / 50)  # so that a later id commits before an earlier one


def publish_until(over, store):
    while not over.is_set():
        publish(store, SystemClock())
        time.sleep(PAUSE)


def read_until(over, store):
    after, seen = 0, []
    while True:
        is_over = over.is_set()
        with store.reading() as connection:
            rows = feed.after(connection, after, 7)
        seen += [json.loads(row.body)["data"]["number"] for row in rows]
        if rows:
            after = rows[-1].number
        elif is_over:
            return seen
        else:
            time.sleep(PAUSE)


@pytest.mark.timeout(120)
def test_twenty_readers_see_every_event_once_and_none_too_late(store):
    written, over = threading.Event(), threading.Event()
    with ThreadPoolExecutor(WRITERS + READERS + 2) as threads:
        try:
            writers = [threads.submit(write, store, number) for number in range(WRITERS)]
            rivals = [threads.submit(publish_until, written, store) for _ in range(2)]
            readers = [threads.submit(read_until, over, store) for _ in range(READERS)]
            wait(writers)
            written.set()
            wait(rivals)
            publish(store, SystemClock())
        finally:
            written.set()
            over.set()
        for one in (*writers, *rivals):
            one.result()
        numbers = list(range(1, WRITERS * EACH + 1))
        assert [one.result() for one in readers] == [numbers] * READERS
