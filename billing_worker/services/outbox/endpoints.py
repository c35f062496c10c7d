"""Operations on endpoints: add, pause, resume, remove, change the secret, test, replay."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.public_events import PublicType
from billing_worker.domain.secret import Secret, webhook_to
from billing_worker.persistence.outbox import cursors, endpoints, feed
from billing_worker.persistence.outbox.endpoints import ACTIVE, PAUSED, Endpoint
from billing_worker.persistence.store import Store
from billing_worker.receivers.address import is_public
from billing_worker.receivers.post import Answer
from billing_worker.receivers.signature import new_secret, signed
from billing_worker.services.outbox.deliver import Outbound, keys_of
from billing_worker.services.ports import Vault

CHANGE_OVER: Final = timedelta(hours=24)
"""How long the previous secret still signs after a change."""

LONGEST_URL: Final = 2_000


@dataclass(frozen=True, slots=True)
class Added:
    id: int
    url: str
    secret: Secret
    """Shown once, when it is made. Afterwards only the vault has it."""


def add(
    store: Store,
    vault: Vault,
    clock: Clock,
    *,
    url: str,
    types: Sequence[str] | None,
    secret: Secret | None = None,
    allow_private: bool = False,
) -> Added:
    """Send events there from now on. Raises InvalidInput on `url` or `events`."""
    _refuse_bad_url(url, allow_private=allow_private)
    unknown = sorted(set(types or ()) - {str(kind) for kind in PublicType})
    if unknown:
        raise InvalidInput("events", f"unknown: {', '.join(unknown)}")
    secret = secret or new_secret()
    locked = vault.lock(secret, webhook_to(url))
    with store.transaction() as connection:
        feed.lock(connection)  # an event goes to the endpoints that exist when it gets its number
        endpoint_id = endpoints.add(connection, url, types, locked, clock.now())
    if endpoint_id is None:
        raise InvalidInput("url", "there is an endpoint with this URL already")
    return Added(endpoint_id, url, secret)


def _refuse_bad_url(url: str, *, allow_private: bool) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        raise InvalidInput("url", "is not a URL") from None
    if parts.scheme != "https" and not (allow_private and parts.scheme == "http"):
        raise InvalidInput("url", "must begin with https://")
    if not parts.hostname or "@" in parts.netloc or parts.fragment:
        raise InvalidInput("url", "must name a host, without credentials and without a fragment")
    if len(url) > LONGEST_URL or not url.isascii() or any(char.isspace() for char in url):
        raise InvalidInput("url", f"must be at most {LONGEST_URL} ASCII characters without spaces")
    if not allow_private and _is_private_literal(parts.hostname):
        raise InvalidInput("url", "is not a public address")


def _is_private_literal(host: str) -> bool:
    """Return whether it is a private address. A host name is resolved and checked at each
    connection.
    """
    try:
        ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return not is_public(host)


def described(connection: Connection) -> list[dict[str, Any]]:
    """Return all endpoints without their secrets.

    Shape: {id, url, events, status, reason, waiting, parked, created_at}; `waiting` and `parked`
    count subscriptions.
    """
    backlog = cursors.backlog(connection)
    return [
        {
            "id": one.id,
            "url": one.url,
            "events": sorted(one.types) if one.types is not None else None,
            "status": one.status,
            "reason": one.reason,
            "waiting": backlog.get(one.id, (0, 0))[0],
            "parked": backlog.get(one.id, (0, 0))[1],
            "created_at": one.created_at.isoformat(),
        }
        for one in endpoints.listed(connection)
    ]


def pause(store: Store, endpoint_id: int, why: str) -> None:
    """Stop sending. Events are kept and sent after `resume`."""
    with store.transaction() as connection:
        _required(connection, endpoint_id)
        endpoints.set_status(connection, endpoint_id, PAUSED, why)


def resume(store: Store, endpoint_id: int) -> None:
    with store.transaction() as connection:
        _required(connection, endpoint_id)
        endpoints.set_status(connection, endpoint_id, ACTIVE, None)


def remove(store: Store, endpoint_id: int) -> None:
    """Remove an endpoint and its waiting deliveries. The feed keeps the events."""
    with store.transaction() as connection:
        feed.lock(connection)  # otherwise the publisher may point its cursor at an event
        _required(connection, endpoint_id)
        endpoints.remove(connection, endpoint_id)


def rotate_secret(
    store: Store, vault: Vault, clock: Clock, endpoint_id: int, secret: Secret | None = None
) -> Secret:
    """Make and return a new secret, shown once. The previous one still signs for CHANGE_OVER."""
    secret = secret or new_secret()
    with store.transaction() as connection:
        endpoint = _required(connection, endpoint_id)
        locked = vault.lock(secret, webhook_to(endpoint.url))
        endpoints.set_secret(connection, endpoint, locked, clock.now() + CHANGE_OVER)
    return secret


def send_test(out: Outbound, endpoint_id: int) -> Answer:
    """Send one signed request of type `webhook.test` now, whatever waits for this endpoint."""
    now = out.clock.now()
    with out.store.reading() as connection:
        endpoint = _required(connection, endpoint_id)
    event_id = f"evt_{uuid.uuid4().hex}"
    event = {"type": "webhook.test", "timestamp": now.isoformat(), "id": event_id, "data": {}}
    body = json.dumps(event).encode()
    headers = signed(keys_of(out.vault, endpoint, now), event_id, int(now.timestamp()), body)
    return out.post(endpoint.url, {**headers, "Content-Type": "application/json"}, body)


def _required(connection: Connection, endpoint_id: int) -> Endpoint:
    endpoint = endpoints.find(connection, endpoint_id)
    if endpoint is None:
        raise InvalidInput("id", f"there is no endpoint {endpoint_id}")
    return endpoint


# --- replay -----------------------------------------------------------------------------------


def replay_parked(store: Store, clock: Clock, endpoint_id: int) -> int:
    """Try parked events now, with a new schedule. Returns how many subscriptions."""
    with store.transaction() as connection:
        _required(connection, endpoint_id)
        return cursors.try_parked_now(connection, endpoint_id, clock.now())


def replay(store: Store, clock: Clock, endpoint_id: int, *, first: int, last: int | None) -> int:
    """Send events of a range of numbers again, in order, before waiting ones.

    Returns how many subscriptions they belong to. Raises InvalidInput on `from` if there are none.
    """
    with store.transaction() as connection:
        newest = feed.lock(connection).number  # no cursor moves meanwhile
        endpoint = _required(connection, endpoint_id)
        asked = cursors.ranges(connection, endpoint, first, newest if last is None else last)
        if not asked:
            raise InvalidInput("from", "there is no event for this endpoint in that range")
        _rewind(connection, endpoint, asked, clock.now())
    return len(asked)


def replay_event(store: Store, clock: Clock, endpoint_id: int, event_id: str) -> int:
    with store.reading() as connection:
        number = feed.number_of(connection, event_id)
    if number is None:
        raise InvalidInput("event", f"there is no event {event_id}")
    return replay(store, clock, endpoint_id, first=number, last=number)


def _rewind(
    connection: Connection,
    endpoint: Endpoint,
    asked: dict[int, tuple[int, int]],
    now: datetime,
) -> None:
    cursors.make(connection, endpoint.id, asked)
    rows = cursors.lock(connection, endpoint.id, asked)
    last = feed.last_sequences(connection, asked)
    moves = {}
    for stream, (first, until) in asked.items():
        row = rows[stream]
        resume_at = row.resume_at or row.head or last[stream] + 1
        if row.head is not None and row.replay_until is None and row.head <= first:
            continue  # It is not sent yet and will be sent anyway.
        moves[stream] = {
            "head": first if row.head is None else min(first, row.head),
            "next_at": now,
            "tries": 0,
            "parked_at": None,
            "replay_until": max(until, row.replay_until or 0),
            "resume_at": resume_at,
        }
    cursors.move(connection, endpoint.id, moves)
