"""The Redis list that other services write commands to, read so that none is ever in one place only.

A message stays in the list until what became of it is committed; whoever works on it holds a lease
meanwhile. So a worker that is killed, and a database that is away, cost time and no command. One
that is worked on twice, because a lease ran out, is carried out once by its reference.

The list is also the order: a message is passed over while an older one in its list is about the
same subject, whichever worker has that one. Nothing else has to remember who comes first.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from redis import Redis

from billing_worker.entrypoints.worker.command_message import LONGEST_ENVELOPE

PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
"""Suffixes of the lists that kombu makes of one queue when a sender sets a priority."""

LEASE_SECONDS = 60
WINDOW = 64
"""How many of the oldest messages one look may pass over: others work on them, or on older ones about
the same subject.
"""

_BUSY_WAIT_SECONDS = 0.1
_IDLE_WAIT_SECONDS = 0.05
"""Between two looks at an empty queue. A blocking read would bring the whole message, of any size."""

_DIGEST_OF = f"""
local longest = {LONGEST_ENVELOPE + 1}
local function digest_of(raw)
  if #raw <= longest then return redis.sha1hex(raw) end
  return redis.sha1hex(string.sub(raw, 1, longest)) .. '-' .. #raw
end
"""

_DIGESTS = """
local digests = {}
for place = 1, tonumber(ARGV[1]) do
  local raw = redis.call('LINDEX', KEYS[1], -place)
  if not raw then break end
  digests[place] = digest_of(raw)
end
return digests
"""
"""The oldest messages at one instant, oldest first, without bringing them here: they may be large."""

_WITH_DIGEST = """
for place = tonumber(ARGV[2]), 1, -1 do
  local raw = redis.call('LINDEX', KEYS[1], -place)
  if raw and digest_of(raw) == ARGV[1] then return string.sub(raw, 1, longest) end
end
return false
"""
"""A message that was seen at that place, cut where it is too long to be read in any case. Places move
towards the end only, as older ones leave.
"""

_REMOVE = """
for place = tonumber(ARGV[2]), 1, -1 do
  local raw = redis.call('LINDEX', KEYS[1], -place)
  if raw and digest_of(raw) == ARGV[1] then return redis.call('LREM', KEYS[1], -1, raw) end
end
"""

Subject = Hashable | None
"""What a message is about; None: it waits for no other."""


def _of_nothing(_raw: bytes) -> Subject:
    return None


@dataclass(frozen=True, slots=True)
class Taken:
    key: str
    raw: bytes
    digest: bytes
    place: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """A message that lies in a list, without its bytes."""

    digest: bytes
    lease: str
    subject: Subject
    place: int = 0


class CommandQueue:
    """`client` must not decode. All methods raise RedisError when Redis is away."""

    def __init__(
        self, client: Redis, name: str, subject_of: Callable[[bytes], Subject] = _of_nothing
    ) -> None:
        """`subject_of` must read any bytes: messages about equal subjects are taken in their order."""
        self._client: Any = client  # redis-py's types know only text
        self._name = name
        self._subject_of = subject_of
        self._keys = [name + suffix for suffix in PRIORITIES]
        self._polling = threading.Lock()
        self._digests: Any = client.register_script(_DIGEST_OF + _DIGESTS)
        self._with_digest: Any = client.register_script(_DIGEST_OF + _WITH_DIGEST)
        self._remove: Any = client.register_script(_DIGEST_OF + _REMOVE)
        self._seen: dict[str, dict[bytes, _Seen]] = {key: {} for key in self._keys}

    def take(self, wait_seconds: float, leaving: threading.Event) -> Taken | None:
        """Lease the oldest message that waits for nobody; None when there is none for a while.

        Messages may be as large as LONGEST_ENVELOPE. So one thread of a process looks at a time,
        and at one message at a time.
        """
        with self._polling:
            if leaving.is_set() or not self._waited_for_one(wait_seconds, leaving):
                return None
            found, waiting = self._find()
        if found is None and waiting:
            leaving.wait(_BUSY_WAIT_SECONDS)
        return found

    def _waited_for_one(self, seconds: float, leaving: threading.Event) -> bool:
        until = time.monotonic() + seconds
        while not self._client.exists(*self._keys):
            left = until - time.monotonic()
            if left <= 0 or leaving.wait(min(left, _IDLE_WAIT_SECONDS)):
                return False
        return True

    def _find(self) -> tuple[Taken | None, bool]:
        """Also whether anything waits at all."""
        waiting = False
        for key in self._keys:
            for message in self._first_of_each_subject(key):
                waiting = True
                if not self._client.set(message.lease, b"", nx=True, ex=LEASE_SECONDS):
                    continue
                raw = self._with_digest(keys=[key], args=[message.digest, message.place])
                if raw is not None:
                    return Taken(key, raw, message.digest, message.place), waiting
                self._client.delete(message.lease)  # It was finished between look and lease.
        return None, waiting

    def _first_of_each_subject(self, key: str) -> Iterator[_Seen]:
        """What no older message keeps from being taken, oldest first."""
        subjects: set[Subject] = set()
        for message in self._oldest(key):
            if message.subject is None or message.subject not in subjects:
                subjects.add(message.subject)
                yield message

    def _oldest(self, key: str) -> Iterator[_Seen]:
        digests = self._digests(keys=[key], args=[WINDOW])
        known = self._seen[key]
        seen = self._seen[key] = {one: known[one] for one in digests if one in known}
        for place, digest in enumerate(digests, 1):
            if digest not in seen:
                raw = self._with_digest(keys=[key], args=[digest, place])
                if raw is None:
                    continue  # It was finished meanwhile: nobody waits for it any more.
                seen[digest] = _Seen(digest, self._lease_of(raw), self._subject_of(raw))
            yield replace(seen[digest], place=place)

    def done(self, taken: Taken) -> None:
        """What became of it is committed: only now the message goes."""
        self._remove(keys=[taken.key], args=[taken.digest, taken.place])
        self.give_back(taken)

    def give_back(self, taken: Taken) -> None:
        self._client.delete(self._lease_of(taken.raw))

    def _lease_of(self, raw: bytes) -> str:
        return f"{self._name}.lease:{hashlib.sha256(raw).hexdigest()}"
