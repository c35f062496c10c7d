"""Our invoices at the gateway, found by the reference that we gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from billing_worker.domain.attempt import Attempt, reference_for
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.evidence import (
    PAID_STATUSES,
    UNSOLD_STATUSES,
    Statement,
    most_telling,
)
from billing_worker.gateway.port import CallLog, WireCall
from billing_worker.persistence import history
from billing_worker.persistence.cases import CaseKey
from billing_worker.persistence.history import Entry
from billing_worker.services.ports import Ports

LOOK_AHEAD = 5
"""Numbers of attempts that left nothing at the gateway, in a row: a refused create, a page that
could not be made, a pause."""

MAYBE_SOLD = (
    "found at the gateway, and restored books (or moved ones) cannot tell whether it was sold"
)
LATER_KNOWN = "the gateway knows a later attempt, which restored books (or moved ones) do not"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks: for the history, and for the shared request cap."""

    by: str
    wait: Callable[[], object]  # for the turn of one request
    shown: Callable[[CallLog], tuple[WireCall, ...]]
    forgetful: bool
    """The books were restored from a backup, and may have forgotten what they have sold."""


@dataclass(frozen=True, slots=True)
class Found:
    statement: Statement  # whole, of the most telling one
    maybe_sold: bool  # before a sale and during one it shows the same (§0 A)


def by_reference(
    ports: Ports, key: CaseKey, reference_id: str, asking: Asking, calls: CallLog
) -> Found | None:
    """None when the gateway has none. Raises GatewayError."""
    asking.wait()
    matches = ports.gateway.find(reference_id, calls)
    if not matches:
        return None
    chosen = most_telling(matches)
    _tell_if_paid_twice(ports, key, chosen, matches, asking.by)
    asking.wait()
    statement = ports.gateway.look(chosen.gateway_id, calls)
    pending = any(one.status in UNSOLD_STATUSES for one in [statement, *matches])
    return Found(statement, pending and statement.status not in PAID_STATUSES)


def knows_later(ports: Ports, attempt: Attempt, asking: Asking, calls: CallLog) -> bool:
    """Whether the gateway knows an attempt of the same invoice with a higher number: restored books
    number anew, and what they forgot may stand behind a gap. Raises GatewayError.
    """
    invoice = attempt.reference_id.removesuffix(reference_for("", attempt.number))
    for number in range(attempt.number + 1, attempt.number + 1 + LOOK_AHEAD):
        asking.wait()
        if ports.gateway.find(reference_for(invoice, number), calls):
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
    kind, data = EventKind.ATTEMPT_QUARANTINED, {"evidence": evidence}
    event = Event(kind, ports.clock.now(), by, data, alert=True)
    with ports.store.transaction() as connection:
        entry = Entry(event, key.subscription_id, key.invoice_id, key.attempt_id)
        history.write(connection, [entry])
    log.error("billing.alert", kind=str(kind), attempt=chosen.reference_id, details=data)
