"""A named person records whether an attempt of unknown outcome was paid.

The decision goes through the one writer of outcomes, like all news about an attempt. Its
consequences, and what the gateway may still report, are in `domain/outcome/resolved.py`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.outcome import Resolved, is_resolved, is_unknown, may_be_resolved
from billing_worker.domain.timings import Timings
from billing_worker.persistence import history, invoices
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.rows import attempt_from
from billing_worker.services.attempts.claim import BY as CHARGE
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.find_by_reference import MAYBE_SOLD
from billing_worker.services.guards.refusals import right_now
from billing_worker.services.operators.debts import MAY_BE_CHARGED
from billing_worker.services.operators.words import required
from billing_worker.services.ports import Ports

_SAID = (
    EventKind.ATTEMPT_POLLED,
    EventKind.ATTEMPT_QUARANTINED,
    EventKind.ATTEMPT_CONTRADICTED,
)


def resolve_unknown(
    ports: Ports, *, reference: str, paid: bool, evidence: str, by: str, why: str
) -> dict[str, Any]:
    """Record that the unknown attempt of an invoice was paid, or was not.

    `reference` names the invoice, one of its attempts, or the gateway's id. The same decision again
    answers `unchanged`. Returns {invoice, attempt, outcome, attempt_status, invoice_status,
    reason}. Raises InvalidInput on `reference` if nothing is unknown.
    """
    evidence, why = required("evidence", evidence), required("why", why)
    with ports.store.reading() as connection:
        key, attempt, said = _found(connection, reference)
        refusal = _prepared(attempt) or _why_not(
            connection, attempt, ports.timings, right_now(ports, connection), paid=paid
        )
    if refusal is not None:
        raise InvalidInput("reference", f"{attempt.reference_id} {refusal}")
    after = settle(ports, Settle(key, Resolved(paid, evidence, why, said), by))
    if after.invoice.status is InvoiceStatus.OPEN:
        _ask_about_surplus(ports, key)
    return {
        "invoice": after.invoice.reference_id,
        "attempt": after.attempt.reference_id,
        "outcome": "unchanged" if after.attempt.resolved_at == attempt.resolved_at else "changed",
        "attempt_status": str(after.attempt.status),
        "invoice_status": str(after.invoice.status),
        "reason": after.invoice.reason,
    }


def _ask_about_surplus(ports: Ports, key: CaseKey) -> None:
    """Poll surplus attempts: their money pays the invoice that is owed again, unless it was
    returned.
    """
    with ports.store.transaction() as connection:
        for row in invoices.attempts_of(connection, key.invoice_id):
            if attempt_from(row).status is AttemptStatus.SURPLUS:
                invoices.poll_again(connection, row.id, right_now(ports, connection))


def _found(connection: Connection, reference: str) -> tuple[CaseKey, Attempt, str | None]:
    """The attempt that is meant, and what the gateway last said of it."""
    invoice = invoices.find(connection, reference)
    if invoice is None:
        raise InvalidInput("reference", f"there is no invoice {reference!r}")
    made = [attempt_from(row) for row in invoices.attempts_of(connection, invoice.id)]
    attempt = _meant(made, reference)
    key = CaseKey(invoice.subscription_id, invoice.id, attempt.id)
    return key, attempt, _last_said(connection, key)


def _meant(made: list[Attempt], reference: str) -> Attempt:
    if not made:
        raise InvalidInput("reference", "nothing was tried yet: `invoices void` stops it")
    for attempt in made:
        if reference in {attempt.reference_id, attempt.gateway_id}:
            return attempt
    unknown = [attempt for attempt in made if is_unknown(attempt)]
    if len(unknown) > 1:
        names = ", ".join(attempt.reference_id for attempt in unknown)
        raise InvalidInput("reference", f"more than one attempt is unknown: name one of {names}")
    resolved = [attempt for attempt in made if attempt.resolved_at is not None]
    return (unknown or resolved or made)[-1]


def _last_said(connection: Connection, key: CaseKey) -> str | None:
    for row in history.told_of(connection, key.invoice_id, key.attempt_id, _SAID):
        said = row.data.get("evidence") or row.data.get("found")
        if said not in invoices.SAYS_NOTHING:
            return str(said)
    return None


def _prepared(attempt: Attempt) -> str | None:
    if attempt.status is not AttemptStatus.PREPARED:
        return None
    if attempt.maybe_sold:
        return f"{MAY_BE_CHARGED}: it was {MAYBE_SOLD}. It is asked about until the gateway decides"
    return "is prepared: these books have sold nothing, so `invoices void` withdraws it"


def _why_not(
    connection: Connection, attempt: Attempt, timings: Timings, now: datetime, *, paid: bool
) -> str | None:
    if is_resolved(attempt, paid=paid):
        return None
    if not may_be_resolved(attempt, paid=paid):
        return f"is not unknown: it is {attempt.status} ({attempt.outcome})"
    if attempt.status is not AttemptStatus.SUBMITTED:
        return None
    if invoices.known_of_submitted(connection, attempt.id) == invoices.PAGE:
        return "is a page on which nobody has paid: it ends by itself"
    return _still_at_work(connection, attempt, timings, now)


def _still_at_work(
    connection: Connection, attempt: Attempt, timings: Timings, now: datetime
) -> str | None:
    """Return whether its own process may still be sending the sale: nobody can know the outcome
    yet.
    """
    over = (attempt.submitted_at or attempt.created_at) + timings.longest_charge
    if attempt.origin is Origin.LINK or now >= over:
        return None
    polled = history.told_of(connection, attempt.invoice_id, attempt.id, [EventKind.ATTEMPT_POLLED])
    if any(row.by == CHARGE for row in polled):
        return None
    return f"is being charged: ask again at {over.isoformat()}"
