"""The Redis list that other services write commands to, read so that none is ever in one place only.

A message stays in the list until what became of it is committed; whoever works on it holds a lease
meanwhile. So a worker that is killed, and a database that is away, cost time and no command. One
that is worked on twice, because a lease ran out, is carried out once by its reference.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

from redis import Redis

PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
"""Suffixes of the lists that kombu makes of one queue when a sender sets a priority."""

LEASE_SECONDS = 60
WINDOW = 32
"""How many of the oldest messages one look may pass over because others work on them."""

_BUSY_WAIT_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Taken:
    key: str
    raw: bytes


class CommandQueue:
    """`client` must not decode. All methods raise RedisError when Redis is away."""

    def __init__(self, client: Redis, name: str) -> None:
        self._client: Any = client  # redis-py's types know only text
        self._name = name
        self._keys = [name + suffix for suffix in PRIORITIES]

    def take(self, wait_seconds: float, leaving: threading.Event) -> Taken | None:
        """Lease the oldest message that nobody works on; None when there is none for a while."""
        # From a list's end to the same end: waits for a message and leaves it where it is.
        self._client.blmove(self._name, self._name, wait_seconds, "RIGHT", "RIGHT")
        waiting = 0
        for key in self._keys:
            oldest_last = self._client.lrange(key, -WINDOW, -1)
            waiting += len(oldest_last)
            for raw in reversed(oldest_last):
                if self._lease(key, raw):
                    return Taken(key, raw)
        if waiting:
            leaving.wait(_BUSY_WAIT_SECONDS)
        return None

    def done(self, taken: Taken) -> None:
        """What became of it is committed: only now the message goes."""
        self._client.lrem(taken.key, -1, taken.raw)
        self.give_back(taken)

    def give_back(self, taken: Taken) -> None:
        self._client.delete(self._lease_of(taken.raw))

    def _lease(self, key: str, raw: bytes) -> bool:
        lease = self._lease_of(raw)
        if not self._client.set(lease, b"", nx=True, ex=LEASE_SECONDS):
            return False
        if self._client.lpos(key, raw, rank=-1, maxlen=2 * WINDOW) is None:
            self._client.delete(lease)  # It was finished between our look and our lease.
            return False
        return True

    def _lease_of(self, raw: bytes) -> str:
        return f"{self._name}.lease:{hashlib.sha256(raw).hexdigest()}"
