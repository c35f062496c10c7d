"""How many messages wait in each queue."""

from __future__ import annotations

from collections.abc import Callable

from redis import Redis

from billing_worker.entrypoints.worker.command_queue import PRIORITIES
from billing_worker.entrypoints.worker.doorbell import (
    CHARGES,
    COMMANDS,
    POLLS,
    SWEEPS,
    WEBHOOKS,
)

QUEUES = (SWEEPS, CHARGES, POLLS, WEBHOOKS, COMMANDS)


def queue_depths(redis_url: str) -> Callable[[], dict[str, int]]:
    """Return a function that counts messages by queue. It raises RedisError if Redis is away."""
    client = Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2)

    def depths() -> dict[str, int]:
        pipeline = client.pipeline(transaction=False)
        for queue in QUEUES:
            for suffix in PRIORITIES:
                pipeline.llen(queue + suffix)
        lengths = iter(pipeline.execute())
        return {queue: sum(next(lengths) for _ in PRIORITIES) for queue in QUEUES}

    return depths
