"""The record of a book that is kept in Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from billing_worker.persistence.book.outside import (
    MOST_SALES,
    Record,
    Sale,
    read_record,
    written,
)

_PREFIX = "billing:outside:"
_AWAY_SECONDS = 30.0
"""Seconds without further calls after Redis did not answer: charges must not wait for it each time.
"""


class RedisRecord:
    """A record in Redis, shared by all processes of a book.

    Redis may lose its data or be unreachable at any time; the record then proves nothing. The sales
    are a Redis list of their own, so that a writer never removes the sales of others.
    """

    path: Path | None = None
    machine: str | None = None
    is_missing = False

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._away_until = 0.0
        self._missed = 0  # sales that this process could not record yet
        self._missed_before_it = 0  # of these, what the record does not claim to know
        self.known: Record | None = None

    def read(self, book: str) -> Record | None:
        self.known = None
        if self._is_left_alone():
            return None
        try:
            with self._client.pipeline() as both:
                both.get(_PREFIX + book)
                both.lrange(_sales_key(book), 0, -1)
                told, sales = both.execute()
        except RedisError:
            self._leave_alone()
            return None
        record = read_record(told)
        if record is not None:
            begun_at = None if self._missed > self._missed_before_it else record.begun_at
            self.known = replace(record, sales=_sales(sales), begun_at=begun_at)
        return self.known

    def begin(self, record: Record) -> None:
        self._begin(record, with_sales=False)

    def renew(self, record: Record) -> None:
        self._begin(record, with_sales=True)

    def _begin(self, record: Record, *, with_sales: bool) -> None:
        missed = self._missed
        if self._is_left_alone():
            return
        try:
            with self._client.pipeline() as both:
                both.set(_PREFIX + record.book, written(replace(record, sales=())))
                if not with_sales:
                    both.delete(_sales_key(record.book))
                both.execute()
        except RedisError:
            self._leave_alone()
        else:
            self._missed_before_it = missed
            self.known = record

    def add(self, book: str, sale: Sale) -> None:
        if self._is_left_alone():
            self._missed += 1
            return
        try:
            with self._client.pipeline() as both:
                both.rpush(_sales_key(book), json.dumps(sale))
                both.ltrim(_sales_key(book), -MOST_SALES, -1)
                both.execute()
        except RedisError:
            self._missed += 1
            self._leave_alone()
        else:
            self.known = self.known and self.known.with_sale(sale)

    def _is_left_alone(self) -> bool:
        return time.monotonic() < self._away_until

    def _leave_alone(self) -> None:
        self._away_until = time.monotonic() + _AWAY_SECONDS
        self.known = None


def _sales_key(book: str) -> str:
    return f"{_PREFIX}{book}:sales"


def _sales(told: Sequence[bytes]) -> tuple[Sale, ...]:
    return tuple(Sale(*json.loads(sale)) for sale in told)
