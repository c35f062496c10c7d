"""Taking a page of due invoices: at most one live attempt each, under a lease and a fence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.terms import Terms
from billing_worker.persistence import claims, history
from billing_worker.persistence.cases import CaseKey
from billing_worker.persistence.claims import DueInvoice, Payer
from billing_worker.persistence.history import Entry
from billing_worker.services.ports import Ports

BY = "charge"

MAX_CLAIMS = 10
"""A row whose workers died this often in a row kills workers: it waits for a person."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """An attempt that this worker alone may drive, as long as nobody raises its fence."""

    key: CaseKey
    attempt: Attempt
    payer: Payer
    earlier: tuple[tuple[CaseKey, str], ...]
    """Ended attempts of the same invoice, with gateway ids: proven unpaid before this one runs."""

    @property
    def create_may_have_been_sent(self) -> bool:
        return self.attempt.fence > 1


def claim(ports: Ports, invoice_ids: Sequence[int]) -> list[Claimed]:
    """Claim what is due among the invoices; the others are somebody else's, or done."""
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        due = claims.lock_due(connection, invoice_ids, now)
        fresh = [item for item in due if item.live is None]
        chargeable = [item for item in fresh if item.card_id is not None]
        lapsed = [item for item in due if _lease_is_over(item, now)]
        poison = [item for item in lapsed if _is_poison(item)]
        retaken = [item for item in lapsed if not _is_poison(item)]

        prepared = _prepare(connection, ports, chargeable, now)
        taken_over = _take_over(connection, ports.terms, retaken, now)
        held = [(item, "card_missing") for item in fresh if item.card_id is None]
        held += [(item, "keeps_crashing") for item in poison]
        _hold(connection, held, now)
        return _claimed(connection, [*prepared, *taken_over], due)


def _lease_is_over(item: DueInvoice, now: datetime) -> bool:
    live = item.live
    return (
        live is not None
        and live.status is AttemptStatus.PREPARED
        and (live.lease_until is None or live.lease_until <= now)
    )


def _is_poison(item: DueInvoice) -> bool:
    return item.live is not None and item.live.claims >= MAX_CLAIMS


def lease(terms: Terms, claims_so_far: int) -> timedelta:
    """Doubles with every claim that died, so that a lease too short for the work grows past it."""
    doubled = terms.stuck_after * (1 << min(claims_so_far, MAX_CLAIMS))
    return min(doubled, max(terms.stuck_after, terms.longest_charge))


def _prepare(
    connection: Connection, ports: Ports, items: Sequence[DueInvoice], now: datetime
) -> list[Attempt]:
    until = now + lease(ports.terms, 0)
    prepared = claims.prepare(
        connection,
        [(item, Origin.SCHEDULED) for item in items],
        test_mode=ports.test_mode,
        now=now,
        lease_until=until,
    )
    claims.ring_later(connection, [attempt.invoice_id for attempt in prepared], until)
    history.write(
        connection,
        (_entry(item, attempt, EventKind.ATTEMPT_PREPARED, now)
         for item, attempt in zip(items, prepared, strict=True)),
    )  # fmt: skip
    return prepared


def _take_over(
    connection: Connection, terms: Terms, items: Sequence[DueInvoice], now: datetime
) -> list[Attempt]:
    lapsed = [(live, now + lease(terms, live.claims)) for item in items if (live := item.live)]
    taken = claims.take_over(connection, lapsed)
    for attempt, until in lapsed:
        claims.ring_later(connection, [attempt.invoice_id], until)
    history.write(
        connection,
        (_entry(item, attempt, EventKind.ATTEMPT_CLAIMED, now)
         for item, attempt in zip(items, taken, strict=True)),
    )  # fmt: skip
    return taken


def _entry(item: DueInvoice, attempt: Attempt, kind: EventKind, now: datetime) -> Entry:
    data = {"reference_id": attempt.reference_id, "fence": attempt.fence, "origin": attempt.origin}
    event = Event(kind, now, BY, data)
    return Entry(event, item.invoice.subscription_id, attempt.invoice_id, attempt.id)


def _hold(connection: Connection, held: Sequence[tuple[DueInvoice, str]], now: datetime) -> None:
    claims.hold(connection, [(item.invoice.id, reason) for item, reason in held])
    history.write(
        connection,
        (
            Entry(
                Event(EventKind.INVOICE_WAITING, now, BY, {"reason": reason}, alert=True),
                item.invoice.subscription_id,
                item.invoice.id,
            )
            for item, reason in held
        ),
    )


def _claimed(
    connection: Connection, attempts: Sequence[Attempt], due: Sequence[DueInvoice]
) -> list[Claimed]:
    if not attempts:
        return []
    payers = claims.payers(connection, [attempt.id for attempt in attempts])
    by_invoice = {item.invoice.id: item for item in due}
    return [
        Claimed(
            payers[attempt.id].key,
            attempt,
            payers[attempt.id],
            _earlier(by_invoice[attempt.invoice_id], attempt),
        )
        for attempt in attempts
    ]


def _earlier(item: DueInvoice, attempt: Attempt) -> tuple[tuple[CaseKey, str], ...]:
    subscription_id = item.invoice.subscription_id
    return tuple(
        (CaseKey(subscription_id, earlier.invoice_id, earlier.id), earlier.gateway_id)
        for earlier in item.attempts
        if earlier.id != attempt.id and earlier.gateway_id is not None
    )
