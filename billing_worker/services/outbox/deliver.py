"""Sends events to one endpoint, in order within a subscription, each until it is accepted.

An event is claimed under a lease and sent outside of any transaction; its cursor moves afterwards.
If the process dies in between, the next one sends the event again with the same id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, Final

import structlog
from sqlalchemy import Connection, Row

from billing_worker.clock import Clock
from billing_worker.domain.outgoing.webhooks import Waits, in_words, next_try
from billing_worker.domain.public_events import PublicType, Told
from billing_worker.domain.secret import Secret, webhook_to
from billing_worker.persistence.outbox import cursors, deliveries, endpoints, pending
from billing_worker.persistence.outbox.cursors import Due
from billing_worker.persistence.outbox.endpoints import ACTIVE, PAUSED, Endpoint
from billing_worker.persistence.store import Store
from billing_worker.receivers.post import Answer, Post
from billing_worker.receivers.signature import signed
from billing_worker.services.notices import accepted as notices
from billing_worker.services.ports import Vault

MOST_IN_FLIGHT: Final = 16
"""Requests of one process to one endpoint at a time."""

LEASE: Final = timedelta(seconds=30)
"""A request begins in the first half of the lease and ends within 15 seconds, so its sender is done
or dead when the lease ends.
"""

GATHER_SECONDS: Final = 0.02
"""How long to collect quick answers, so that they share one commit."""

GONE: Final = "the receiver answered 410 Gone"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outbound:
    """What a sender needs. It shares nothing with charges."""

    store: Store
    clock: Clock
    vault: Vault
    post: Post
    waits: Waits


def deliver(
    out: Outbound,
    endpoint_id: int,
    threads: Executor,
    is_leaving: Callable[[], bool] = lambda: False,
) -> int:
    """Send everything that is due. Returns the number of tries."""
    flying: dict[Future[Answer | None], Due] = {}
    ended: list[tuple[Due, Answer | None]] = []
    tries = 0
    while True:
        now = out.clock.now()
        with out.store.transaction() as connection:
            endpoint = endpoints.find(connection, endpoint_id)
            if endpoint is None:
                return tries
            is_open = _apply(connection, out, endpoint, ended, now) and not is_leaving()
            room = MOST_IN_FLIGHT - len(flying)
            due = cursors.claim(connection, endpoint.id, now, now + LEASE, room) if is_open else []
        tries += len(due)
        keys = keys_of(out.vault, endpoint, now) if due else []
        flying |= {threads.submit(_send, out, endpoint.url, keys, one, now): one for one in due}
        if not flying:
            return tries
        done, _ = wait(flying, timeout=GATHER_SECONDS)
        if not done:
            done, _ = wait(flying, return_when=FIRST_COMPLETED)
        ended = [(flying.pop(future), future.result()) for future in done]


def keys_of(vault: Vault, endpoint: Endpoint, now: datetime) -> list[Secret]:
    """Return the secret, and the previous one while it still signs."""
    keys = [vault.unlock(endpoint.secret, webhook_to(endpoint.url))]
    if endpoint.old_secret and endpoint.old_until and now < endpoint.old_until:
        keys.append(vault.unlock(endpoint.old_secret, webhook_to(endpoint.url)))
    return keys


def _send(
    out: Outbound, url: str, keys: Sequence[Secret], due: Due, claimed_at: datetime
) -> Answer | None:
    """Send one event. None: not sent, because the lease may end before the request does."""
    now = out.clock.now()
    if now - claimed_at > LEASE / 2:
        return None
    body = due.body.encode()
    headers = signed(keys, due.event_id, int(now.timestamp()), body)
    return out.post(url, {**headers, "Content-Type": "application/json"}, body)


def _apply(
    connection: Connection,
    out: Outbound,
    endpoint: Endpoint,
    ended: Sequence[tuple[Due, Answer | None]],
    now: datetime,
) -> bool:
    """Move the cursors. Return False if nothing more is to be sent to this endpoint."""
    if not ended:
        return endpoint.status == ACTIVE
    rows = cursors.lock(connection, endpoint.id, {due.stream for due, _ in ended})
    # A sender that lost its claim, or its event to a replay, does not move the cursor.
    ours = [(due, answer) for due, answer in ended if _is_held(rows.get(due.stream), due)]
    sent = [(due, answer) for due, answer in ours if answer is not None]
    failures = {due.stream: in_words(one.status, one.reason) for due, one in sent}
    taken = [due.stream for due, _ in sent if failures[due.stream] is None]
    following = cursors.following(connection, endpoint, taken) if taken else {}
    moves: dict[int, dict[str, Any]] = {}
    for due, answer in ours:
        row = rows[due.stream]
        if answer is None:
            moves[due.stream] = _kept(row) | {"next_at": now}
        elif failures[due.stream] is None:
            moves[due.stream] = _moved_on(row, following.get(due.stream), now)
        else:
            moves[due.stream] = _put_off(row, out.waits, answer, now)
    accepted = [(due.stream, due.body) for due, _ in sent if failures[due.stream] is None]
    notices.taken(connection, accepted, f"webhook endpoint {endpoint.id}", now)
    deliveries.record(
        connection,
        endpoint.id,
        [(due.number, answer.status, failures[due.stream]) for due, answer in sent],
        now,
    )
    if any(one["parked_at"] for one in moves.values()):
        _tell_of_parked(connection, endpoint, next(filter(None, failures.values())), now)
    cursors.move(connection, endpoint.id, moves)
    if any(answer.status == HTTPStatus.GONE for _, answer in sent):
        _pause(connection, endpoint, now)
        return False
    return endpoint.status == ACTIVE


def _is_held(row: Row[Any] | None, due: Due) -> bool:
    return row is not None and (row.claim, row.head) == (due.claim, due.sequence)


def _kept(row: Row[Any]) -> dict[str, Any]:
    names = ("head", "next_at", "tries", "parked_at", "replay_until", "resume_at")
    return {name: getattr(row, name) for name in names}


def _moved_on(row: Row[Any], following: int | None, now: datetime) -> dict[str, Any]:
    moved = {"head": following, "next_at": now if following is not None else None, "tries": 0}
    is_replaying = row.replay_until is not None and following is not None
    way_back = (row.replay_until, row.resume_at)
    if not is_replaying or following >= row.resume_at:
        way_back = (None, None)
    return moved | {"parked_at": None, "replay_until": way_back[0], "resume_at": way_back[1]}


def _put_off(row: Row[Any], waits: Waits, answer: Answer, now: datetime) -> dict[str, Any]:
    following = next_try(waits, row.tries + 1, now, answer.retry_after)
    parked_at = (row.parked_at or now) if following.parked else None
    put_off = {"next_at": following.at, "tries": row.tries + 1, "parked_at": parked_at}
    return _kept(row) | put_off


def _tell_of_parked(connection: Connection, endpoint: Endpoint, why: str, now: datetime) -> None:
    """Alert once, when the first stream of an endpoint is parked."""
    if not cursors.has_parked(connection, endpoint.id):
        _alert(connection, "webhook.parked", endpoint, f"no try has succeeded: {why}", now)


def _pause(connection: Connection, endpoint: Endpoint, now: datetime) -> None:
    endpoints.set_status(connection, endpoint.id, PAUSED, GONE)
    _alert(connection, "webhook.paused", endpoint, GONE, now)


def _alert(connection: Connection, kind: str, endpoint: Endpoint, why: str, now: datetime) -> None:
    """Alert also as an event for other endpoints. The URL is left out, because it may hold a
    secret.
    """
    log.error("billing.alert", kind=kind, endpoint=endpoint.id, reason=why)
    details: Mapping[str, Any] = {"about": kind, "why": f"endpoint {endpoint.id}: {why}"}
    pending.add(connection, [(Told(PublicType.ATTENTION_NEEDED, now, details), None, None)])
