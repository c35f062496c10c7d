"""Drops repeated history entries: an undecided attempt is polled for days."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from billing_worker.domain.attempt import LIVE, Attempt, Origin
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import history
from billing_worker.persistence.history import Entry, Last

SAY_AGAIN_AFTER = timedelta(hours=1)
"""Repeated news is written this often, and not at every poll."""

LONG_UNDECIDED = timedelta(days=1)
"""At this age of an undecided attempt a person is told, once."""

_REPEATED = frozenset({EventKind.ATTEMPT_POLLED, EventKind.ATTEMPT_POSTPONED})


def worth_saying(
    connection: Connection, entries: Sequence[Entry], attempts: Sequence[Attempt], now: datetime
) -> list[Entry]:
    """Return the entries without repetitions, and an alert for each attempt that has been undecided
    for too long.
    """
    repeated = [
        (entry.invoice_id, entry.attempt_id)
        for entry in entries
        if entry.event.kind in _REPEATED
        and entry.invoice_id is not None
        and entry.attempt_id is not None
    ]
    if not repeated:
        return list(entries)
    last = history.last_of(connection, repeated, EventKind.ATTEMPT_UNDECIDED)
    by_id = {attempt.id: attempt for attempt in attempts}
    kept: list[Entry] = []
    for entry in entries:
        before = last.get(entry.attempt_id or 0)
        if entry.event.kind not in _REPEATED or before is None:
            kept.append(entry)
            continue
        attempt = by_id[entry.attempt_id or 0]
        alert = _is_long_undecided(attempt, now) and not before.was_said
        same = before.kind == entry.event.kind and _gist(before.data) == _gist(entry.event.data)
        if not same:
            kept.append(entry)
        elif alert or now - before.at >= SAY_AGAIN_AFTER or _left_something(entry.event):
            kept.append(_still(entry, before))
        if alert:
            kept.append(_alert(entry, attempt))
    return kept


def _gist(data: Mapping[str, object]) -> dict[str, object]:
    """Return the content of an entry without dates and calls, which differ each time."""
    return {name: data[name] for name in ("found", "reason") if name in data}


def _still(entry: Entry, last: Last) -> Entry:
    since = last.data.get("unchanged_since", last.at.isoformat())
    data = {**entry.event.data, "unchanged_since": since}
    return replace(entry, event=replace(entry.event, data=data))


def _left_something(event: Event) -> bool:
    """Return whether a request may have created something at the gateway: that is always
    written.
    """
    return any(
        call["method"] != "GET" and not call["outcome"].startswith("not sent")
        for call in event.data.get("calls", ())
    )


def _is_long_undecided(attempt: Attempt, now: datetime) -> bool:
    """Return whether it is undecided for too long. A page may stay open for days: the customer
    decides.
    """
    if attempt.status not in LIVE or attempt.origin is Origin.LINK:
        return False
    return now - attempt.created_at >= LONG_UNDECIDED


def _alert(entry: Entry, attempt: Attempt) -> Entry:
    said = {
        **_gist(entry.event.data),
        "reference_id": attempt.reference_id,
        "since": attempt.created_at,
    }
    event = replace(entry.event, kind=EventKind.ATTEMPT_UNDECIDED, data=said, alert=True)
    return replace(entry, event=event)
