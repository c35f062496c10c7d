"""Polls attempts whose outcome is open, or that ended a while ago."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import structlog

from billing_worker.domain.errors import ConcurrentChange, GatewayError
from billing_worker.domain.outcome import News, NoAnswer, Stated
from billing_worker.gateway.port import CallLog
from billing_worker.persistence import attempts, invoices, pay_links
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.store import AWAY
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.forgotten_charges import suspect_forgotten_charges
from billing_worker.services.charging.links_not_handed_out import ask_by_reference
from billing_worker.services.doorbell import poll_due
from billing_worker.services.ports import Ports

BY = "reconcile"

AFTER_A_CRASH = timedelta(minutes=10)

log = structlog.get_logger()


def reconcile_due(ports: Ports) -> int:
    """Wake workers for attempts that are due for polling. Returns how many were found."""
    suspect_forgotten_charges(ports)
    return poll_due(ports)


def poll_batch(ports: Ports, attempt_ids: Sequence[int]) -> dict[str, int]:
    """Poll each attempt's invoice and settle the answer. Returns counts by resulting state."""
    with ports.store.reading() as connection:
        keys = attempts.keys_of(connection, attempt_ids)
        nameless = pay_links.known_by_reference(connection, attempt_ids, ports.clock.now())
    polls = [(key, partial(poll, ports, key, gateway_id)) for key, gateway_id in keys]
    polls += [(key, partial(ask_by_reference, ports, key)) for key in nameless]
    return dict(Counter(ports.pool.map(partial(_poll_safely, ports), polls)))


def _poll_safely(ports: Ports, asked: tuple[CaseKey, Callable[[], str]]) -> str:
    attempt_id, poll_at_it = asked[0].attempt_id, asked[1]
    try:
        return poll_at_it()
    except (ConcurrentChange, *AWAY) as error:
        log.warning("reconcile.interrupted", attempt_id=attempt_id, reason=type(error).__name__)
        return "interrupted"
    except Exception:
        # A bug of ours. The attempt stays as it is and is polled again, but not at every sweep.
        log.exception("billing.alert", kind="reconcile.crashed", attempt_id=attempt_id)
        with ports.store.transaction() as connection:
            invoices.poll_later(connection, attempt_id, ports.clock.now() + AFTER_A_CRASH)
        return "crashed"


def poll(ports: Ports, key: CaseKey, gateway_id: str) -> str:
    """Poll one attempt. No answer proves nothing: it is polled again later."""
    calls: CallLog = []
    ports.pace.wait()
    asked_at = ports.clock.now()
    try:
        news: News = Stated(ports.gateway.poll(gateway_id, calls), asked_at)
    except GatewayError as error:
        news = NoAnswer(error.reason)
    return str(settle(ports, Settle(key, news, BY, tuple(calls))).attempt.status)
