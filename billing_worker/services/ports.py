"""What a use case needs from the world, gathered once in `bootstrap.py` and passed along."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol, TypeVar

from billing_worker.clock import Clock
from billing_worker.domain.secret import Secret
from billing_worker.domain.timings import Timings
from billing_worker.gateway.port import Gateway
from billing_worker.gateway.rate_limit import Pace
from billing_worker.persistence.book.outside import Memory, Record, Sale
from billing_worker.persistence.store import Store
from billing_worker.services.circuit_breaker import CircuitBreaker

T = TypeVar("T")
R = TypeVar("R")


class Bell(Protocol):
    """Wakes workers. A lost, doubled or late ring is harmless: sweeps ring again."""

    def charge(self, invoice_ids: Sequence[int]) -> None: ...

    def poll(self, attempt_ids: Sequence[int]) -> None: ...


class Pool(Protocol):
    """Runs one function over many items, at once or one after the other."""

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]: ...

    def take(self, work: Callable[[T], R], found: Callable[[], Sequence[T]]) -> list[R]: ...


class CommitGroup(Protocol):
    """Lets callers that ask at the same time share one transaction."""

    def __call__(
        self, work: Callable[[Ports, Sequence[T]], Sequence[R]], ports: Ports, request: T
    ) -> R: ...


class Outside(Protocol):
    """Keeps a record of the book outside of its database."""

    path: Path | None
    """The database, where the record is a file beside it."""

    machine: str | None
    """Which machine this is, where the record is a file and the machine can be known."""

    known: Record | None
    """What was read or written last."""

    @property
    def is_missing(self) -> bool:
        """The file beside the database is gone. A flushed Redis is ordinary: False."""
        ...

    def read(self, book: str) -> Record | None:
        """`book`: its identity. A file beside a database may hold the record of another."""
        ...

    def begin(self, record: Record) -> None:
        """Begin it anew: what it said is forgotten."""
        ...

    def renew(self, record: Record) -> None:
        """Keep its sales, and let it vouch for no time before `begun_at`."""
        ...

    def add(self, book: str, sale: Sale) -> None:
        """Name one more sale. What other processes have added stays, in whatever order."""
        ...


class Timekeeper(Protocol):
    def ahead_by(self, database_now: datetime | None) -> timedelta:
        """How far our clock is ahead of what the database server says, if it says anything."""
        ...


class Vault(Protocol):
    def doubt(self) -> None: ...

    def lock(self, secret: Secret) -> bytes: ...

    def unlock(self, locked: bytes) -> Secret: ...


def random_name() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Ports:
    store: Store
    gateway: Gateway
    clock: Clock
    bell: Bell
    pool: Pool
    vault: Vault
    pace: Pace
    timings: Timings
    test_mode: bool
    commit_group: CommitGroup
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    outside: Sequence[Outside] = field(default_factory=lambda: (Memory(),))
    timekeeper: Timekeeper | None = None  # None: a clock of its own, compared with none
    needs_synchronous_standby: bool = False
    name_create: Callable[[], str] = random_name
    """By its name an invoice that is found is proven to be the work of one create. A life that these
    books have forgotten must never have used the same.
    """
