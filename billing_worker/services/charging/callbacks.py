"""Callbacks only cause a poll: the worker asks the gateway, whatever the callback claims.

A callback that is lost, repeated, late, merged, out of order, or forged with a stolen key cannot
change what is charged. It costs one GET.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.secret import OF_CALLBACK, Secret
from billing_worker.gateway.answer_bodies import Hint, UnreadableError, called_back
from billing_worker.gateway.callback_signature import is_signed
from billing_worker.persistence import callbacks, counters, history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.ports import Bell, Vault

BY = "callback"
COUNTER = "callbacks."
"""Prefix of the counters, one for each fate that stores nothing."""


class Fate(StrEnum):
    """The result of a callback. Every result but STORED leaves only a count."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # The same bytes are stored already: a repetition or a replay.
    FORGED = "forged"
    OTHER_MODE = "other_mode"  # live in test mode, or the reverse
    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"


@dataclass(frozen=True, slots=True)
class Inbox:
    """What the callback endpoint needs. `key` verifies the callbacks of our mode."""

    store: Store
    clock: Clock
    vault: Vault
    bell: Bell
    key: Secret
    test_mode: bool


def is_genuine(inbox: Inbox, body: bytes, signature: str | None) -> bool:
    return is_signed(body, signature, inbox.key)


def receive(inbox: Inbox, body: bytes) -> Fate:
    """Store a genuine callback and wake a worker for its invoice. Returns after the commit.

    Only the invoice and the mode are read from it. A callback about an unknown invoice is stored
    too: it may arrive before our own commit, and the first poll comes by itself.
    """
    try:
        hint = called_back(body)
    except UnreadableError:
        return count(inbox, Fate.UNREADABLE)
    if hint.test_mode != inbox.test_mode:
        return count(inbox, Fate.OTHER_MODE)
    locked = inbox.vault.lock(Secret(body.decode()), OF_CALLBACK)
    digest = hashlib.sha256(body).hexdigest()
    now = inbox.clock.now()
    with inbox.store.transaction() as connection:
        is_new = callbacks.keep(
            connection, gateway_id=hint.gateway_id, digest=digest, body=locked, now=now
        )
        if not is_new:
            counters.add(connection, COUNTER + Fate.DUPLICATE, 1, now)
            return Fate.DUPLICATE
        event = Event(EventKind.ATTEMPT_CALLED_BACK, now, BY, {"digest": digest})
        attempt_id = _poll_now(connection, hint, event)
    if attempt_id is not None:
        inbox.bell.poll([attempt_id])
    return Fate.STORED


def _poll_now(connection: Connection, hint: Hint, event: Event) -> int | None:
    key = callbacks.poll_now(connection, hint.gateway_id, event.at, reference=hint.reference_id)
    if key is None:
        return None
    history.write(connection, [Entry.about(key, event)])
    return key.attempt_id


def count(inbox: Inbox, fate: Fate, number: int = 1) -> Fate:
    """Count callbacks with this result."""
    with inbox.store.transaction() as connection:
        counters.add(connection, COUNTER + fate, number, inbox.clock.now())
    return fate
