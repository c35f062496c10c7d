"""How long the money of an ended attempt may still come, and what has to wait for it.

    the attempt that ended                      what comes by itself   asked for      a page
    nothing of it was ever sold                 -                      -              -
    a named person says that it is not paid     -                      -              -
    our sale, `expired`, no refusal is known    72 h                   72 h           72 h
    our sale, `expired`, a refusal is known     72 h                   -              -
    a page, `expired`                           72 h                   -              -
    declined by the gateway's own final word    10 minutes             10 minutes     -
    declined on a page (it stood for the grace) -                      -              -

"72 h" is `BILLING_EXPIRED_RETRY_SECONDS`, counted from the gateway's `expired`: a sale that may have
arrived can still be approved after it (gateway.md §0 H). Asked for is what a person orders
(`invoices retry`) or a customer's new card. Pages that a customer opens after a page of theirs, or
after a refusal that they know of, do not wait: they know whether they paid. Whatever waits is
asked about once more right before the next attempt (`services/charging/previous_attempts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.dunning import ASKED_FOR
from billing_worker.domain.timings import Timings

NOT_SENT = "not_sent"
"""Kept as the sale's status when the frame that armed the attempt knows that no sale left it."""

_ENDED_UNPAID = frozenset({AttemptStatus.DECLINED, AttemptStatus.NOT_CHARGED})


def was_never_sold(attempt: Attempt) -> bool:
    """Then its invoice at the gateway is pending until it expires, which means nothing."""
    return attempt.submitted_at is None or attempt.sale_status == NOT_SENT


def ended_unproven(attempt: Attempt) -> bool:
    """Our own sale may have arrived, and nobody has ever refused it: it just expired."""
    is_ours = attempt.origin is not Origin.LINK and not was_never_sold(attempt)
    return attempt.status is AttemptStatus.NOT_CHARGED and is_ours and attempt.resolved_at is None


def not_before(origin: Origin, ended: Iterable[Attempt], timings: Timings) -> datetime | None:
    """The earliest moment for an attempt of this origin on the invoice of the attempts that
    `ended`. None: now.
    """
    waits = (_not_before(origin, attempt, timings) for attempt in ended)
    return max((until for until in waits if until is not None), default=None)


def _not_before(origin: Origin, attempt: Attempt, timings: Timings) -> datetime | None:
    if attempt.status not in _ENDED_UNPAID or was_never_sold(attempt) or attempt.resolved_at:
        return None
    ended_at = attempt.settled_at or attempt.created_at
    expired_at = attempt.unpaid_since
    if ended_unproven(attempt):
        return (expired_at or ended_at) + timings.expired_retry
    if expired_at is not None and origin not in ASKED_FOR:
        return expired_at + timings.expired_retry
    declined = attempt.status is AttemptStatus.DECLINED
    if declined and Origin.LINK not in {origin, attempt.origin}:
        return ended_at + timings.decline_stands
    return None
