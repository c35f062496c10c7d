"""The record of a book that is kept in Redis."""

from __future__ import annotations

import time
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from billing_worker.persistence.book.outside import Record, read_record, written

_KEY = "billing:outside"
_AWAY_SECONDS = 30.0
"""A Redis that did not answer is left alone for so long: a charge must not wait for it each time."""


class RedisRecord:
    """One key. Redis may be flushed, or away, at any time: then nothing is known."""

    path: Path | None = None
    is_missing = False

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._away_until = 0.0
        self.known: Record | None = None

    def read(self) -> Record | None:
        self.known = None
        if time.monotonic() >= self._away_until:
            try:
                self.known = read_record(self._client.get(_KEY))
            except RedisError:
                self._leave_alone()
        return self.known

    def write(self, record: Record) -> None:
        if time.monotonic() < self._away_until:
            return
        try:
            self._client.set(_KEY, written(record))
        except RedisError:
            self._leave_alone()
        else:
            self.known = record

    def _leave_alone(self) -> None:
        self._away_until = time.monotonic() + _AWAY_SECONDS
        self.known = None
