"""Charges that raise an error: the cause, and who is told.

An error that affects every charge (a vault key, a setting, the database, a bug of ours) is not
counted against a row: no further charge starts until one succeeds again. An error of a single row
is counted, until the row waits for a person (`claim.MAX_CLAIMS`).
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from traceback import walk_tb

import structlog
from sqlalchemy import Connection

from billing_worker.domain.errors import ConcurrentChange, KeysInDoubt, WrongKey, WrongPlace
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import claims, counters, history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import AWAY
from billing_worker.services.attempts.claim import BY, Claimed
from billing_worker.services.circuit_breaker import Verdict
from billing_worker.services.doorbell import ring_for
from billing_worker.services.ports import Ports

WRONG_PLACE = "its card token was stored for another customer: somebody has copied it"
WRONG_KEY = "its card token opens with none of BILLING_VAULT_KEYS"

_KNOWN: dict[type[Exception], str] = {
    WrongKey: WRONG_KEY,
    KeysInDoubt: WRONG_KEY,
    WrongPlace: WRONG_PLACE,
}

STOPPED_ALERT_AGAIN_AFTER = timedelta(hours=1)

_PACKAGE = Path(__file__).parents[2]

log = structlog.get_logger()


def passed(ports: Ports, claimed: Claimed) -> None:
    """Record that a charge had a result, whatever it is."""
    kept_back = ports.breaker.passed(claimed.key.invoice_id)
    if kept_back is not None:
        log.warning("charging.goes_on", kept_back=len(kept_back))
        ring_for(ports, kept_back)


def left_to_another(ports: Ports, claimed: Claimed, moved: ConcurrentChange) -> str:
    log.info("charge.left_to_another", reason=str(moved))
    try:
        with ports.store.transaction() as connection:
            claims.uncount(connection, [claimed.attempt])
    except AWAY as error:
        return interrupted(ports, claimed, error)
    return "left_to_another"


def interrupted(ports: Ports, claimed: Claimed, error: BaseException) -> str:
    reason = f"database: {type(error).__name__}"
    log.warning("charge.interrupted", attempt=claimed.attempt.reference_id, reason=reason)
    now = ports.clock.monotonic()
    verdict = ports.breaker.failed(claimed.attempt, reason, now, blameless=True)
    _write_down(ports, claimed, verdict, reason)
    return "interrupted"


def crashed(ports: Ports, claimed: Claimed, error: Exception) -> str:
    has_no_key = isinstance(error, WrongKey)
    reason = _KNOWN.get(type(error)) or f"its charge crashed: {_where(error)}"
    now = ports.clock.monotonic()
    verdict = ports.breaker.failed(claimed.attempt, reason, now, key=has_no_key)
    if verdict.is_first and not (has_no_key and ports.breaker.is_open):
        log.error("billing.alert", kind="charge.crashed",
                  attempt=claimed.attempt.reference_id, exc_info=error)  # fmt: skip
    else:
        log.warning("charge.crashed", attempt=claimed.attempt.reference_id, reason=reason)
    _write_down(ports, claimed, verdict, reason)
    return "crashed"


def stop_charging(ports: Ports, reason: str) -> None:
    """Stop charging because of an error that is known to affect every charge."""
    ports.breaker.open(ports.clock.monotonic())
    with ports.store.transaction() as connection:
        _tell_people(ports, connection, reason)
    log.error("billing.alert", kind=str(EventKind.CHARGING_STOPPED), reason=reason)


def _where(error: Exception) -> str:
    """Return where the error was raised. Its message may hold anything and differs by row."""
    place = ""
    for frame, line in walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            place = f" at {path.relative_to(_PACKAGE)}:{line}"
    return f"{type(error).__name__}{place}"


def _write_down(ports: Ports, claimed: Claimed, verdict: Verdict, reason: str) -> None:
    if verdict.opened:
        log.error("billing.alert", kind=str(EventKind.CHARGING_STOPPED), reason=reason)
    try:
        with ports.store.transaction() as connection:
            claims.tell_why(connection, claimed.key.invoice_id, reason)
            claims.uncount(connection, verdict.innocent)
            if verdict.opened:
                _tell_people(ports, connection, reason)
    except Exception as error:  # noqa: BLE001 - what broke the charge may break this too
        ports.breaker.still_counted(verdict.innocent)
        log.warning("charge.failure_not_written", reason=type(error).__name__)


def _tell_people(ports: Ports, connection: Connection, reason: str) -> None:
    """Alert once for all processes."""
    now, kind = ports.clock.now(), EventKind.CHARGING_STOPPED
    if counters.add_unless_recent(connection, kind, now, now - STOPPED_ALERT_AGAIN_AFTER):
        history.write(connection, [Entry(Event(kind, now, BY, {"reason": reason}, alert=True))])
