"""Our invoices at the gateway, found by the reference that we gave them."""

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
"""Numbers of attempts that left nothing at the gateway, in a row: a refused create, a page that
could not be made, a pause."""

MAYBE_SOLD = (
    "found at the gateway, and restored books (or moved ones) cannot tell whether it was sold"
)
LATER_KNOWN = "the gateway knows a later attempt, which restored books (or moved ones) do not"
KNOWN_THERE = "the gateway knows an invoice under a reference that this book has not used yet"
UNPROVEN = "found at the gateway, and nothing proves that it was not sold: it is left to end"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks: for the history, and for the shared request cap."""

    by: str
    wait: Callable[[], object]  # for the turn of one request
    shown: Callable[[CallLog], tuple[WireCall, ...]]
    forgetful: bool
    """The books were restored from a backup, and may have forgotten what they have sold."""
    owner: Owner
    """Whose the invoices are that may be believed."""
    remembers: bool = False
    """It is proven that these books have forgotten no sale of this invoice."""


@dataclass(frozen=True, slots=True)
class Found:
    statement: Statement  # whole, of the most telling one
    maybe_sold: bool  # before a sale and during one it shows the same (§0 A)
    made_by: tuple[str | None, ...]
    """Names of the creates that have made the invoices under the reference; None: not said."""

    @property
    def count(self) -> int:
        return len(self.made_by)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Under our reference there is an invoice of another book, or of another customer."""

    whose: str


def by_reference(
    ports: Ports, key: CaseKey, attempt: Attempt, asking: Asking, calls: CallLog
) -> Found | Foreign | None:
    """None when the gateway has none. Raises GatewayError.

    Rows of a list name neither book nor customer, so each invoice is read by itself. Where ours is
    among them, ours counts, and a person is told of the foreign one: ours may have been sold.
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
    """As the gateway lists them. Tells a person when its lists cannot be believed."""
    asking.wait()
    try:
        return ports.gateway.find(reference_id, calls)
    except LookUpUnreliable as error:
        _tell_unreliable(ports, key, error.reason, asking.by)
        raise


def _tell_unreliable(ports: Ports, key: CaseKey, reason: str, by: str) -> None:
    """Once a day for all: it is the gateway's way, and meets every charge that is in doubt."""
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
    """Whether the gateway knows an attempt of the same invoice with a higher number: restored books
    number anew, and what they forgot may stand behind a gap. Raises GatewayError.
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
