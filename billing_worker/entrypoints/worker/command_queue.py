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
        self._polling = threading.Lock()

    def take(self, wait_seconds: float, leaving: threading.Event) -> Taken | None:
        """Lease the oldest message that nobody works on; None when there is none for a while.

        Messages may be as large as Redis allows, and nobody is told how large before they have
        come. So one thread of a process looks at a time, and at one message at a time.
        """
        with self._polling:
            if leaving.is_set():
                return None
            # From a list's end to the same end: waits for a message and leaves it where it is.
            oldest = self._client.blmove(self._name, self._name, wait_seconds, "RIGHT", "RIGHT")
            if oldest is not None and self._lease(self._name, oldest):
                return Taken(self._name, oldest)
            del oldest
            found, waiting = self._find()
        if found is None and waiting:
            leaving.wait(_BUSY_WAIT_SECONDS)
        return found

    def _find(self) -> tuple[Taken | None, bool]:
        """Also whether anything waits at all. Places move meanwhile: the next look sees what this
        one has passed over.
        """
        waiting = False
        for key in self._keys:
            for place in range(1, WINDOW + 1):
                raw = self._client.lindex(key, -place)
                if raw is None:
                    break
                waiting = True
                if self._lease(key, raw):
                    return Taken(key, raw), waiting
        return None, waiting

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
