"""Looks for charges that the books have forgotten, of invoices that nothing is planned for.

After a loss, an invoice is looked for at the gateway before it is charged. Many are not charged any
more: paid by an attempt of before the loss, waived because they are late, void by a decision that is
said again, paused, or held for a person. The time that was lost may have charged them all the same.
So their next attempt is written down as ended, and polled by its reference like any other ended
attempt without a gateway id. Money that is found pays what is owed and what was only waived; it is
surplus elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection

from billing_worker.domain.attempt import SUSPECTED
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import claims, counters, history, subscriptions, switches
from billing_worker.persistence import forgotten_charges as rows
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.services.ports import Ports

BY = "reconcile"
EVERY, EVERY_LATER = timedelta(hours=1), timedelta(days=1)
"""The search reads all invoices since shortly before the loss. Nothing is urgent about it: no money
moves. It becomes rare a month after the loss, and ends a year after it.
"""

_LATER, _ENDS = timedelta(days=31), timedelta(days=400)

_BACK = timedelta(days=62)
"""An older invoice is charged only if a person asks for it."""

_BATCH = 200


def suspect_forgotten_charges(ports: Ports) -> int:
    """Write down what the gateway is to be asked about. Returns how many attempts."""
    now = ports.clock.now()
    with ports.store.reading() as connection:
        lost_at = switches.restored_at(connection)
    if lost_at is None or now > lost_at + _ENDS:
        return 0
    every = EVERY if now <= lost_at + _LATER else EVERY_LATER
    with ports.store.transaction() as connection:
        if switches.waits_for_decisions(connection):
            return 0  # The search begins when sales do: until then the loss is not over.
        if not counters.add_unless_recent(connection, "forgotten_charges", now, now - every):
            return 0
        since = switches.searched_until(connection) or lost_at
        first = switches.first_loss(connection) or lost_at
        left = rows.left_without_a_look(connection, lost_at, since, first - _BACK)
    suspected = sum(
        _suspect(ports, left[start : start + _BATCH]) for start in range(0, len(left), _BATCH)
    )
    if not suspected:
        with ports.store.transaction() as connection:
            if switches.restored_at(connection) == lost_at:
                switches.end_search(connection, by=BY, now=now)
    return suspected


def suspect_up_to(ports: Ports, key: CaseKey, number: int | None) -> None:
    """Write down the attempts of an invoice up to the one of this number, which the gateway knows."""
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        subscriptions.lock_these(connection, [key.subscription_id])
        while number is not None:
            item = next(iter(claims.lock_these(connection, [key.invoice_id])), None)
            if item is None or item.live is not None or len(item.attempts) >= number:
                break
            _write(connection, ports, [item], now)


def _suspect(ports: Ports, invoice_ids: list[int]) -> int:
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        subscriptions.lock_these(connection, rows.subscriptions_of(connection, invoice_ids))
        idle = [one for one in claims.lock_these(connection, invoice_ids) if one.live is None]
        switched = switches.read(connection)
        near = [one for one in idle if switched.may_be_forgotten(one.invoice)]
        _write(connection, ports, near, now)
    return len(near)


def _write(
    connection: Connection, ports: Ports, items: Sequence[DueInvoice], now: datetime
) -> None:
    made = rows.suspect(connection, items, test_mode=ports.test_mode, now=now)
    event = Event(EventKind.ATTEMPT_SUSPECTED, now, BY, {"reason": SUSPECTED})
    history.write(
        connection,
        [
            Entry.about(CaseKey(one.invoice.subscription_id, one.invoice.id, attempt.id), event)
            for one, attempt in zip(items, made, strict=True)
        ],
    )
