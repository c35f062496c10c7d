"""Finds our invoices at the gateway by our reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from billing_worker.domain.attempt import Attempt, reference_for
from billing_worker.domain.errors import LookUpUnreliable
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.statement import (
    DECLINED_STATUSES,
    PAID_STATUSES,
    UNPAID_FINAL_STATUSES,
    UNSOLD_STATUSES,
    Expected,
    Statement,
    foreign,
    most_telling,
)
from billing_worker.persistence import counters, history
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.history import Entry
from billing_worker.services.charging.session import GatewaySession

TELL_AGAIN_AFTER = timedelta(days=1)

POLL_AHEAD = 5
"""Attempts in a row that may have left nothing at the gateway: a refused create, a failed page, a
pause.
"""

MAYBE_SOLD = (
    "found at the gateway, and restored books (or moved ones) cannot tell whether it was sold"
)
LATER_KNOWN = "the gateway knows a later attempt, which restored books (or moved ones) do not"
KNOWN_THERE = "the gateway knows an invoice under a reference that this book has not used yet"
UNPROVEN = "found at the gateway, and nothing proves that it was not sold: it is left to end"

_UNPAID = DECLINED_STATUSES | UNPAID_FINAL_STATUSES

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Found:
    statement: Statement  # complete, of the invoice that decides
    maybe_sold: bool  # it looks the same before and during a sale (§0 A)
    made_by: tuple[str | None, ...]
    """Names of the creates that made the invoices under the reference; None: not said."""

    @property
    def count(self) -> int:
        return len(self.made_by)


@dataclass(frozen=True, slots=True)
class Foreign:
    """An invoice of another book or customer has our reference."""

    whose: str
    may_be_paid: bool


def by_reference(session: GatewaySession, key: CaseKey, attempt: Attempt) -> Found | Foreign | None:
    """Return what the gateway has under the reference, or None. Raises GatewayError.

    Rows of a list name neither book nor customer, so each invoice is read by itself. If ours is
    among them, it counts, and a person is told of the foreign one: ours may have been sold.
    """
    matches = _listed(session, key, attempt.reference_id)
    if not matches:
        return None
    expected = Expected(
        attempt.reference_id, attempt.money, test_mode=attempt.test_mode, owner=session.owner
    )
    read = [_read(session, one) for one in matches]
    whose = next(filter(None, (foreign(one, expected) for one in read)), None)
    ours = [one for one in read if foreign(one, expected) is None]
    if not ours:
        return Foreign(whose or "", any(one.status not in _UNPAID for one in read))
    chosen = most_telling(ours)
    _tell_if_paid_twice(session, key, chosen, ours)
    if whose is not None:
        _quarantine(session, key, chosen, f"beside {chosen.gateway_id}: {whose}")
    pending = any(one.status in UNSOLD_STATUSES for one in [*ours, *matches])
    made_by = tuple(one.create for one in ours)
    return Found(chosen, pending and chosen.status not in PAID_STATUSES, made_by)


def _listed(session: GatewaySession, key: CaseKey, reference_id: str) -> list[Statement]:
    """Return the invoices as the gateway lists them. Alerts if the list cannot be trusted."""
    session.wait()
    try:
        return session.find(reference_id)
    except LookUpUnreliable as error:
        _tell_unreliable(session, key, error.reason)
        raise


def _tell_unreliable(session: GatewaySession, key: CaseKey, reason: str) -> None:
    """Alert once a day for all charges: the gateway's lists affect each charge that needs a
    look-up.
    """
    ports = session.ports
    kind, now = EventKind.LOOK_UP_UNRELIABLE, ports.clock.now()
    event = Event(kind, now, session.by, {"reason": reason}, alert=True)
    with ports.store.transaction() as connection:
        if not counters.add_unless_recent(connection, kind, now, now - TELL_AGAIN_AFTER):
            return
        history.write(connection, [Entry.about(key, event)])
    log.error("billing.alert", kind=str(kind), details={"reason": reason})


def _read(session: GatewaySession, listed: Statement) -> Statement:
    session.wait()
    return session.poll(listed.gateway_id)


def later_number(session: GatewaySession, key: CaseKey, attempt: Attempt) -> int | None:
    """Return the next higher number under which the gateway has an attempt of the same invoice, or
    None. Raises GatewayError.

    Restored books number attempts again; a lost one may stand behind a gap.
    """
    invoice = attempt.reference_id.removesuffix(reference_for("", attempt.number))
    for number in range(attempt.number + 1, attempt.number + 1 + POLL_AHEAD):
        if _listed(session, key, reference_for(invoice, number)):
            return number
    return None


def _tell_if_paid_twice(
    session: GatewaySession, key: CaseKey, chosen: Statement, matches: Sequence[Statement]
) -> None:
    paid = [one for one in matches if one.status in PAID_STATUSES]
    others = [f"{one.gateway_id} is {one.status}" for one in paid if one is not chosen]
    if not others:
        return
    evidence = f"paid more than once: {chosen.gateway_id} counts, and {', '.join(others)}"
    _quarantine(session, key, chosen, evidence)


def _quarantine(session: GatewaySession, key: CaseKey, found: Statement, evidence: str) -> None:
    kind, data = EventKind.ATTEMPT_QUARANTINED, {"evidence": evidence}
    event = Event(kind, session.ports.clock.now(), session.by, data, alert=True)
    with session.ports.store.transaction() as connection:
        history.write(connection, [Entry.about(key, event)])
    log.error("billing.alert", kind=str(kind), attempt=found.reference_id, details=data)
