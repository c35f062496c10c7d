"""Encrypt all stored secrets with the newest key, or only test which of them decrypt.

Charges go on meanwhile: a batch is read without a lock and written only where the value is still
the one that was read. A rotation that was interrupted starts again and finds the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from sqlalchemy import Row

from billing_worker.clock import Clock
from billing_worker.domain.errors import WrongKey, WrongPlace
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault.encrypted import COLUMNS, EncryptedColumn, batches
from billing_worker.services.ports import Vault


class Lock(StrEnum):
    NEWEST = "newest"  # encrypted with the newest key and bound to its row
    OLDER = "older"  # with an older key, or by a version that bound it to no row
    NO_KEY = "no_key"
    ELSEWHERE = "elsewhere"  # encrypted for another row


@dataclass(slots=True)
class Inspected:
    """How many stored secrets there are of each kind, by how they are encrypted."""

    counts: Mapping[str, Counter[Lock]]
    broken: list[str] = field(default_factory=list)
    """The first rows that do not decrypt: "card tokens 17: no_key"."""

    @property
    def is_good(self) -> bool:
        return not self.broken

    def total(self, lock: Lock) -> int:
        return sum(one[lock] for one in self.counts.values())

    def as_data(self) -> dict[str, Any]:
        """Return {kind of secret: {state: number}} of what is stored."""
        return {called: {str(k): n for k, n in one.items()} for called, one in self.counts.items()}


Progress = Callable[[str, int], None]
"""Is told the kind of secret, and how many of it are done."""

_SHOWN = 20


def inspect(store: Store, vault: Vault, progress: Progress) -> Inspected:
    """Try every stored secret. Writes nothing."""
    return _each(store, vault, progress, writes=False)


def rotate(
    store: Store, vault: Vault, clock: Clock, progress: Progress, *, by: str, why: str
) -> Inspected:
    """Encrypt what is older with the newest key, bound to its row. What does not decrypt stays.

    The result says how the secrets were encrypted before.
    """
    done = _each(store, vault, progress, writes=True)
    data = {"why": why, "renewed": done.total(Lock.OLDER), "broken": len(done.broken)}
    with store.transaction() as connection:
        event = Event(EventKind.VAULT_ROTATED, clock.now(), by, data)
        history.write(connection, [Entry(event)])
    return done


def tokens_exported(store: Store, clock: Clock, *, by: str, why: str | None) -> None:
    """Record that somebody is about to see every card token in clear."""
    with store.transaction() as connection:
        event = Event(EventKind.TOKENS_EXPORTED, clock.now(), by, {"why": why})
        history.write(connection, [Entry(event)])


def _each(store: Store, vault: Vault, progress: Progress, *, writes: bool) -> Inspected:
    done = Inspected({one.called: Counter() for one in COLUMNS})
    for column in COLUMNS:
        for rows in batches(partial(_read, store, column)):
            renewed = [_looked_at(vault, column, row, done) for row in rows]
            new = [one for one in renewed if one is not None]
            if writes and new:
                with store.transaction() as connection:
                    column.swap(connection, new)
            progress(column.called, done.counts[column.called].total())
    return done


def _read(store: Store, column: EncryptedColumn, after_id: int) -> list[Row[Any]]:
    with store.reading() as connection:
        return list(column.batch(connection, after_id))


def _looked_at(
    vault: Vault, column: EncryptedColumn, row: Row[Any], done: Inspected
) -> tuple[int, bytes, bytes] | None:
    """Count the row. Returns (id, old, new) if it is to be written anew."""
    new = None
    try:
        new = vault.renewed(row.locked, column.place(row))
        lock = Lock.NEWEST if new is None else Lock.OLDER
    except WrongKey:
        lock = Lock.NO_KEY
    except WrongPlace:
        lock = Lock.ELSEWHERE
    done.counts[column.called][lock] += 1
    if lock in {Lock.NO_KEY, Lock.ELSEWHERE} and len(done.broken) < _SHOWN:
        done.broken.append(f"{column.called} {row.id}: {lock}")
    return None if new is None else (row.id, row.locked, new)
