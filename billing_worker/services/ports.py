"""The ports of a use case: what it needs from outside, built once in `bootstrap.py`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol, TypeVar

from billing_worker.clock import Clock
from billing_worker.domain.attempt import Attempt
from billing_worker.domain.secret import Place, Secret
from billing_worker.domain.timings import Timings
from billing_worker.gateway.port import Gateway, WireCall
from billing_worker.gateway.rate_limit import Pace
from billing_worker.persistence.book.outside import Memory, Record, Sale
from billing_worker.persistence.store import Store
from billing_worker.services.circuit_breaker import CircuitBreaker

T = TypeVar("T")
R = TypeVar("R")


class Bell(Protocol):
    """Wakes workers. A lost, repeated or late message is harmless: the sweeps send again."""

    def charge(self, invoice_ids: Sequence[int]) -> None: ...

    def poll(self, attempt_ids: Sequence[int]) -> None: ...


class Pool(Protocol):
    """Runs one function over many items, concurrently or one by one."""

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]: ...

    def take(self, work: Callable[[T], R], found: Callable[[], Sequence[T]]) -> list[R]: ...


class CommitGroup(Protocol):
    """Lets concurrent callers share one transaction."""

    def __call__(
        self, work: Callable[[Ports, Sequence[T]], Sequence[R]], ports: Ports, request: T
    ) -> R: ...


class Outside(Protocol):
    """Keeps a record of the book outside of its database."""

    path: Path | None
    """The database file, if the record is a file beside it."""

    machine: str | None
    """This machine's identity, if the record is a file and the machine can be identified."""

    known: Record | None
    """The record that was read or written last."""

    @property
    def is_missing(self) -> bool:
        """Whether the file beside the database is missing. An empty Redis is ordinary: False."""
        ...

    def read(self, book: str) -> Record | None:
        """Read the record of this book. A file beside a database may hold another book's record."""
        ...

    def begin(self, record: Record) -> None:
        """Begin a new record in place of the old one."""
        ...

    def renew(self, record: Record) -> None:
        """Keep the sales, and claim completeness only from `begun_at` on."""
        ...

    def add(self, book: str, sale: Sale) -> None:
        """Add one sale. Sales of other processes stay, in any order."""
        ...


class Timekeeper(Protocol):
    def ahead_by(self, database_now: datetime | None) -> timedelta:
        """Return how far our clock is ahead of the database server's, if the server reports one."""
        ...


class Meter(Protocol):
    """Counts for monitoring what is committed or done already. Never raises."""

    def ended(self, attempt: Attempt) -> None:
        """Count an attempt that has come to its end, or to another one."""
        ...

    def refused(self, rule: str) -> None:
        """Count an attempt that a rule has forbidden."""
        ...

    def called(self, call: WireCall) -> None:
        """Count a request to the gateway and its time."""
        ...


class Unmetered:
    """Nobody asks for figures."""

    def ended(self, attempt: Attempt) -> None: ...

    def refused(self, rule: str) -> None: ...

    def called(self, call: WireCall) -> None: ...


class Vault(Protocol):
    def doubt(self) -> None: ...

    def lock(self, secret: Secret, place: Place) -> bytes: ...

    def unlock(self, locked: bytes, place: Place) -> Secret: ...

    def renewed(self, locked: bytes, place: Place) -> bytes | None: ...


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
    timekeeper: Timekeeper | None = None  # None: not compared with another clock
    needs_synchronous_standby: bool = False
    meter: Meter = field(default_factory=Unmetered)
    how_to_cancel: str | None = None  # what the merchant tells customers about it
    name_create: Callable[[], str] = random_name
    """Returns a new name for a create. It proves which create made an invoice that is found. Names
    are never repeated, not even in a time that the books have lost.
    """
