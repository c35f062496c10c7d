"""Finds our invoices at the gateway by our reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from billing_worker.domain.attempt import Attempt, reference_for
from billing_worker.domain.errors import LookUpUnreliable
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.statement import (
    PAID_STATUSES,
    UNSOLD_STATUSES,
    Expected,
    Owner,
    Statement,
    foreign,
    most_telling,
)
from billing_worker.gateway.port import CallLog, WireCall
from billing_worker.persistence import counters, history
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.history import Entry
from billing_worker.services.ports import Ports

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

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Asking:
    """The caller of a look-up: for the history and the shared rate limit."""

    by: str
    wait: Callable[[], object]  # waits for the permit of one request
    shown: Callable[[CallLog], tuple[WireCall, ...]]
    forgetful: bool
    """The books were restored from a backup and may have lost sales."""
    owner: Owner
    """The owner that an invoice must have to count."""
    remembers: bool = False
    """It is proven that these books have lost no sale of this invoice."""


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


def by_reference(
    ports: Ports, key: CaseKey, attempt: Attempt, asking: Asking, calls: CallLog
) -> Found | Foreign | None:
    """Return what the gateway has under the reference, or None. Raises GatewayError.

    Rows of a list name neither book nor customer, so each invoice is read by itself. If ours is
    among them, it counts, and a person is told of the foreign one: ours may have been sold.
    """
    matches = _listed(ports, key, attempt.reference_id, asking, calls)
    if not matches:
        return None
    expected = Expected(
        attempt.reference_id, attempt.money, test_mode=attempt.test_mode, owner=asking.owner
    )
    read = [_read(ports, one, asking, calls) for one in matches]
    whose = next(filter(None, (foreign(one, expected) for one in read)), None)
    ours = [one for one in read if foreign(one, expected) is None]
    if not ours:
        return Foreign(whose or "")
    chosen = most_telling(ours)
    _tell_if_paid_twice(ports, key, chosen, ours, asking.by)
    if whose is not None:
        _quarantine(ports, key, chosen, f"beside {chosen.gateway_id}: {whose}", asking.by)
    pending = any(one.status in UNSOLD_STATUSES for one in [*ours, *matches])
    made_by = tuple(one.create for one in ours)
    return Found(chosen, pending and chosen.status not in PAID_STATUSES, made_by)


def _listed(
    ports: Ports, key: CaseKey, reference_id: str, asking: Asking, calls: CallLog
) -> list[Statement]:
    """Return the invoices as the gateway lists them. Alerts if the list cannot be trusted."""
    asking.wait()
    try:
        return ports.gateway.find(reference_id, calls)
    except LookUpUnreliable as error:
        _tell_unreliable(ports, key, error.reason, asking.by)
        raise


def _tell_unreliable(ports: Ports, key: CaseKey, reason: str, by: str) -> None:
    """Alert once a day for all charges: the gateway's lists affect each charge that needs a
    look-up.
    """
    kind, now = EventKind.POLL_UP_UNRELIABLE, ports.clock.now()
    event = Event(kind, now, by, {"reason": reason}, alert=True)
    with ports.store.transaction() as connection:
        if not counters.add_unless_recent(connection, kind, now, now - TELL_AGAIN_AFTER):
            return
        entry = Entry.about(key, event)
        history.write(connection, [entry])
    log.error("billing.alert", kind=str(kind), details={"reason": reason})


def _read(ports: Ports, listed: Statement, asking: Asking, calls: CallLog) -> Statement:
    asking.wait()
    return ports.gateway.poll(listed.gateway_id, calls)


def knows_later(
    ports: Ports, key: CaseKey, attempt: Attempt, asking: Asking, calls: CallLog
) -> bool:
    """Return whether the gateway has an attempt of the same invoice with a higher number. Raises
    GatewayError.

    Restored books number attempts again; a lost one may stand behind a gap.
    """
    invoice = attempt.reference_id.removesuffix(reference_for("", attempt.number))
    for number in range(attempt.number + 1, attempt.number + 1 + POLL_AHEAD):
        if _listed(ports, key, reference_for(invoice, number), asking, calls):
            return True
    return False


def _tell_if_paid_twice(
    ports: Ports, key: CaseKey, chosen: Statement, matches: Sequence[Statement], by: str
) -> None:
    paid = [one for one in matches if one.status in PAID_STATUSES]
    others = [f"{one.gateway_id} is {one.status}" for one in paid if one is not chosen]
    if not others:
        return
    evidence = f"paid more than once: {chosen.gateway_id} counts, and {', '.join(others)}"
    _quarantine(ports, key, chosen, evidence, by)


def _quarantine(ports: Ports, key: CaseKey, found: Statement, evidence: str, by: str) -> None:
    kind, data = EventKind.ATTEMPT_QUARANTINED, {"evidence": evidence}
    event = Event(kind, ports.clock.now(), by, data, alert=True)
    with ports.store.transaction() as connection:
        entry = Entry.about(key, event)
        history.write(connection, [entry])
    log.error("billing.alert", kind=str(kind), attempt=found.reference_id, details=data)
