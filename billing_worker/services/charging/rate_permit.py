"""Waits for the shared rate limit and renews the lease meanwhile."""

from __future__ import annotations

from functools import partial

from billing_worker.persistence import claims
from billing_worker.services.attempts.claim import Claimed
from billing_worker.services.guards.refusals import right_now
from billing_worker.services.ports import Ports


def take(ports: Ports, claimed: Claimed, requests: int = 1) -> float:
    """Wait until so many requests may be sent, and keep the lease. Returns the seconds waited.

    Raises ConcurrentChange if another claim has taken over.
    """
    began = ports.clock.monotonic()
    ports.pace.wait(requests, partial(_keep, ports, claimed))
    _keep(ports, claimed)
    return ports.clock.monotonic() - began


def _keep(ports: Ports, claimed: Claimed) -> None:
    """Renew the lease at half of its time: a waiting worker is not a dead one.

    Otherwise a small rate limit ends every lease before its sale, for ever.
    """
    lease = claimed.lease
    if lease.until - ports.clock.now() > lease.length / 2:
        return
    with ports.store.transaction() as connection:
        now = right_now(ports, connection)
        claims.renew(connection, claimed.attempt, now + lease.length)
    lease.until = now + lease.length
