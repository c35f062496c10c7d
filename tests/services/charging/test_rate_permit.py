"""A charge that waits for the shared request cap: its claim holds, and what it knows stays fresh."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.timings import Timings
from billing_worker.persistence import claims
from billing_worker.persistence.schema.tables import attempts
from billing_worker.services.attempts.claim import MAX_CLAIMS, claim
from billing_worker.services.charging.charge import charge_batch
from billing_worker.services.charging.session import ChargeSession
from billing_worker.services.doorbell import ring_due
from billing_worker.services.invoicing.renew import renew_due
from tests.support.one_by_one import OneByOne
from tests.support.world import PatientBell

pytestmark = pytest.mark.sql

TICK = timedelta(seconds=10)
TERMS = Timings(stuck_after=timedelta(seconds=60), longest_charge=timedelta(seconds=120))


class Worker(threading.Thread):
    """Runs only while the test waits for it, so that the interleaving is the same every time."""

    def __init__(self, world, wait_seconds):
        super().__init__(daemon=True)
        self._go, self._stopped_by = threading.Semaphore(0), threading.Semaphore(0)
        self._clock, self._seconds = world.clock, timedelta(seconds=wait_seconds)
        self.bell = PatientBell()
        self.ports = world.ports_of_a_worker(TERMS, bell=self.bell, pace=self)
        self.leaves = False
        self.start()

    def run(self):
        self._go.acquire()
        while not self.leaves:
            ring_due(self.ports)
            while self.bell.messages:
                charge_batch(self.ports, self.bell.messages.pop(0)[1])
            self._stop()
        self._stopped_by.release()

    def wait(self, n=1, meanwhile=None):
        """As Pace: everybody waits equally long, because the cap is small."""
        until = self._clock.now() + self._seconds
        while self._clock.now() < until:
            self._stop()
            if meanwhile is not None:
                meanwhile()

    def _stop(self):
        self._stopped_by.release()
        self._go.acquire()

    def step(self):
        self._go.release()
        assert self._stopped_by.acquire(timeout=30)


def test_workers_that_wait_for_a_small_cap_longer_than_a_lease_charge_nevertheless(world):
    world.subscribe("approved")
    renew_due(world.ports)
    workers = [Worker(world, wait_seconds=100), Worker(world, wait_seconds=100)]
    for _ in range(60):
        for worker in workers:
            worker.step()
        world.clock.advance(TICK)
    assert world.sales("sub-1-p0-a1") == 1
    world.run_for(timedelta(minutes=2), step=TICK)
    assert world.fate() == "paid"
    assert "attempt.claimed" not in world.events()


def two_claims(world):
    world.subscribe("approved")
    world.sweep()
    (message,) = world.bell.messages
    (slow,) = claim(world.ports, message[1])
    world.clock.advance(world.ports.timings.stuck_after)
    (successor,) = claim(world.ports, message[1])
    return slow, successor


def claims_of(world):
    with world.store.reading() as connection:
        return connection.execute(select(attempts.c.claims)).scalar_one()


def test_a_claim_that_was_replaced_while_it_waited_sends_nothing(world):
    slow, _ = two_claims(world)
    sent = len(world.transport.sent)
    with pytest.raises(ConcurrentChange):
        ChargeSession.of(world.ports, slow).wait()
    assert len(world.transport.sent) == sent


class Hands(OneByOne):
    """Begins claims that somebody else has made."""

    def __init__(self, claimed):
        self._claimed = claimed

    def take(self, work, _found):
        return self.map(work, self._claimed)


def test_a_claim_that_was_merely_slow_does_not_count_as_a_crash(world):
    slow, successor = two_claims(world)
    assert claims_of(world) == 2
    ports = world.ports_of_a_worker(pool=Hands([slow]))
    assert charge_batch(ports, []) == {"left_to_another": 1}
    assert claims_of(world) == 1
    ports = world.ports_of_a_worker(pool=Hands([successor]))
    assert charge_batch(ports, []) == {"succeeded": 1}


def test_a_claim_that_dies_counts_as_a_crash_although_others_were_slow(world):
    world.subscribe("approved")
    world.sweep()
    (message,) = world.bell.messages
    for _ in range(MAX_CLAIMS + 1):
        claim(world.ports, message[1])
        world.clock.advance(world.ports.timings.stuck_after)
    assert world.explain()["reason"] == f"keeps_crashing: its worker died {MAX_CLAIMS} times"


def test_an_ordinary_charge_renews_nothing(world, monkeypatch):
    renewed = []
    monkeypatch.setattr(claims, "renew", lambda *_: renewed.append(1))
    world.subscribe("approved")
    world.tick()
    assert world.fate() == "paid"
    assert renewed == []


class LongTurns:
    """Takes this long before each sale; counts what it has allowed."""

    def __init__(self, clock, before_the_sale):
        self._clock, self._seconds = clock, before_the_sale
        self.allowed = 0

    def wait(self, n=1, meanwhile=None):
        self.allowed += n
        if n == 1:
            return
        for _ in range(10):
            self._clock.advance(self._seconds / 10)
            if meanwhile is not None:
                meanwhile()


def operations(world):
    return [
        call["operation"]
        for event in world.explain()["history"]
        for call in event["data"].get("calls", ())
    ]


def test_an_invoice_that_expired_while_the_sale_waited_for_its_turn_is_not_sold(world):
    world.subscribe("approved")
    world.ports = world.ports_of_a_worker(pace=LongTurns(world.clock, 2 * 3600))
    world.tick()
    assert world.sales("sub-1-p0-a1") == 0
    assert world.attempts() == ["not_charged"]
    assert operations(world) == ["create", "look"]


@pytest.mark.parametrize(("seconds", "calls"), [
    (4, ["create", "sale", "look"]),
    (6, ["create", "look", "sale"]),
])  # fmt: skip
def test_the_invoice_is_polled_at_again_only_after_a_long_wait_and_within_the_cap(
    world, seconds, calls
):
    world.subscribe("approved")
    pace = LongTurns(world.clock, seconds)
    world.ports = world.ports_of_a_worker(pace=pace)
    world.tick()
    assert operations(world) == calls
    assert pace.allowed == len(world.transport.sent)
    world.ports = world.ports_of_a_worker()
    world.run_for(timedelta(minutes=2), step=TICK)
    assert world.fate() == "paid"
