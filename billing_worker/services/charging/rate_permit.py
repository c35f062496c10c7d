"""Waiting for the shared request cap, and keeping the claim while waiting."""

from __future__ import annotations

from functools import partial

from billing_worker.persistence import claims
from billing_worker.services.attempts.claim import Claimed
from billing_worker.services.guards.refusals import right_now
from billing_worker.services.ports import Ports


def take(ports: Ports, claimed: Claimed, requests: int = 1) -> float:
    """Wait until this many requests may be sent, with a lease that holds. Returns seconds waited.

    Raises ConcurrentChange when another claim has replaced this one, in the queue or here.
    """
    began = ports.clock.monotonic()
    ports.pace.wait(requests, partial(_keep, ports, claimed))
    _keep(ports, claimed)
    return ports.clock.monotonic() - began


def _keep(ports: Ports, claimed: Claimed) -> None:
    """Renew the lease when half of it is gone: a frame that merely waits is not one that died.

    Without this a small cap would end every lease before its sale, for ever.
    """
    lease = claimed.lease
    if lease.until - ports.clock.now() > lease.length / 2:
        return
    with ports.store.transaction() as connection:
        now = right_now(ports, connection)
        claims.renew(connection, claimed.attempt, now + lease.length)
    lease.until = now + lease.length
