"""Receivers of webhooks that a test answers for, and beats that send to them."""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import Executor, Future

from billing_worker.persistence.outbox import cursors
from billing_worker.receivers.post import Answer
from billing_worker.services.outbox import endpoints
from billing_worker.services.outbox.deliver import deliver
from billing_worker.services.outbox.publish import publish

SHOP, BOOKS = "https://shop.example/billing", "https://books.example/in"


class AtOnce(Executor):
    """Runs what is submitted right away, in the calling thread."""

    def submit(self, work, /, *args, **kwargs):
        future = Future()
        future.set_result(work(*args, **kwargs))
        return future


class Receivers:
    """Answers as it is told to, and keeps what it has taken."""

    def __init__(self):
        self.calls = []
        self.taken = defaultdict(list)
        self.dead = self.stuck = None  # an URL that hangs up, a subscription that is refused
        self.say(200)

    def say(self, status, retry_after=None):
        self._answer = Answer(status, retry_after=retry_after)

    def __call__(self, url, headers, body):
        event = json.loads(body)
        self.calls.append((url, headers, body))
        answer = self._answer
        if url == self.dead:
            answer = Answer(None, "timeout")
        if self.stuck and event["data"]["subscription"] == self.stuck:
            answer = Answer(500)
        if answer.status == 200:
            self.taken[url].append(event)
        return answer

    @property
    def tried(self):
        return [json.loads(body) for _, _, body in self.calls]

    def sequences(self, url=SHOP):
        """What was taken, by subscription, without repetitions of the same id."""
        seen, found = set(), defaultdict(list)
        for event in self.taken[url]:
            if event["id"] not in seen:
                found[event["data"]["subscription"]].append(event["data"]["sequence"])
            seen.add(event["id"])
        return dict(found)


def add(world, url=SHOP, **options):
    return endpoints.add(world.store, world.vault, world.clock, url=url, types=None, **options)


def send(out):
    """One beat: number what is committed, and send what is due to each endpoint."""
    publish(out.store, out.clock)
    with out.store.reading() as connection:
        due = cursors.endpoints_due(connection, out.clock.now())
    return sum(deliver(out, endpoint_id, AtOnce()) for endpoint_id in due)


def send_for(out, span, step):
    end = out.clock.now() + span
    while out.clock.now() < end:
        send(out)
        out.clock.advance(step)
