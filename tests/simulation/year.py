"""One year of 1,000 subscriptions, and how soon unknown outcomes are known once a gateway heals."""

from __future__ import annotations

import random
import time
from datetime import timedelta

from sqlalchemy import func, select

from billing_worker.persistence.schema import tables
from billing_worker.sandbox.gateway import Behaviour
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.simulation.memory import MemoryStore
from tests.support.cohort import Cohort
from tests.support.contradictions import contradictions
from tests.support.records import monthly
from tests.support.world import World

SUBSCRIPTIONS = 1_000
OUTAGE_ATTEMPTS = 40
SWEEPS_A_DAY = 6
BETWEEN_SWEEPS = timedelta(hours=24 / SWEEPS_A_DAY)
"""Anchors lie on sweeps: a beat that ticks every minute finds hardly anything late."""
MIX = (
    ("approved", 88), ("approved_later", 3), ("answer_lost_after", 3), ("error_500_after", 1),
    ("decline_insufficient_funds", 3), ("decline_card_expired", 1), ("create_answer_lost", 1),
)  # fmt: skip


def calm_world(template: bytes, behaviour: Behaviour | None = None) -> World:
    """A world in memory in which nothing interrupts a task, and a page shares its commits."""
    world = World(MemoryStore(template, lambda _: None, lambda: ""), behaviour)
    cohort = Cohort()
    world.ports = world.ports_of_a_worker(pool=cohort, commit_group=cohort)
    return world


def subscribe_many(
    world: World, count: int, rng: random.Random, mix=MIX, spread_days: int = 30
) -> None:
    tokens, weights = zip(*mix, strict=True)
    start = world.clock.now()
    records = [
        monthly(
            number,
            rng.choices(tokens, weights)[0],
            start + BETWEEN_SWEEPS * rng.randrange(spread_days * SWEEPS_A_DAY + 1),
        )
        for number in range(count)
    ]
    for first in range(0, count, 500):
        subscribe(world.store, world.vault, world.clock, records[first : first + 500], by="test")


def simulate_a_year(template: bytes, seed: int = 1) -> dict[str, float]:
    """A year of sweeps; returns counts and seconds of real time."""
    world = calm_world(template)
    subscribe_many(world, SUBSCRIPTIONS, random.Random(seed))
    started = time.process_time()
    for _ in range(365 * SWEEPS_A_DAY):
        world.tick()
        world.clock.advance(BETWEEN_SWEEPS)
    seconds = time.process_time() - started
    problems = world.discrepancies()
    problems += contradictions(world.store, world.clock.now(), at_rest=False)
    assert problems == [], problems[:10]
    with world.store.reading() as connection:
        query = select(tables.invoices.c.status, func.count()).group_by(tables.invoices.c.status)
        counts = {status: count for status, count in connection.execute(query)}  # noqa: C416
    return {"seconds": seconds, "debits": world.debits().total(), **counts}


def recovery_times(template: bytes, outage: timedelta, seed: int = 1) -> list[float]:
    """Seconds from the end of an outage until each attempt that it left unknown was known.

    The gateway takes every sale and answers nobody while the outage lasts.
    """
    world = calm_world(template)
    subscribe_many(world, OUTAGE_ATTEMPTS, random.Random(seed), (("answer_lost_after", 1),), 0)
    world.sweep()
    world.deliver()  # everything is sold, no answer arrives
    world.transport.unreachable = True
    end = world.clock.now() + outage
    while world.clock.now() < end:
        world.tick()
        world.clock.advance(60)
    world.transport.unreachable = False
    healed = world.clock.now()
    for _ in range(80):
        world.tick()
        world.clock.advance(15)
    with world.store.reading() as connection:
        left_unknown = connection.execute(
            select(tables.attempts.c.settled_at).where(tables.attempts.c.submitted_at < healed)
        ).scalars()
        times = [(moment - healed).total_seconds() for moment in left_unknown]
    assert len(times) >= OUTAGE_ATTEMPTS
    return sorted(times)
