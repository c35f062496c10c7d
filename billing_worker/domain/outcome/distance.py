"""How long an ended attempt may still be paid, and how long the next attempt waits for that.

    the ended attempt                            next: automatic   on request    pay page
    no sale was sent                             -                 -             -
    a named person decided that it is not paid   -                 -             -
    our sale, `expired`, no refusal is known     72 h              72 h          72 h
    our sale, `expired`, a refusal is known      72 h              10 minutes    -
    a pay page, `expired`                        72 h              -             -
    our sale, declined by a final status         10 minutes        10 minutes    -
    a pay page, declined (stood for the grace)   -                 -             -

"72 h" is `BILLING_EXPIRED_RETRY_SECONDS`, counted from the gateway's `expired`: a sale that arrived
can still be approved after it (gateway.md §0 H). "10 minutes" count from the end of the attempt and
are never longer than the grace. "On request" is an order of a person (`invoices retry`) or a new
card. A customer who opens a pay page after an earlier page or a known refusal does not wait: they
know whether they paid. Right before the next attempt the ended ones are polled once more
(`services/charging/previous_attempts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.dunning import ASKED_FOR
from billing_worker.domain.timings import Timings

NOT_SENT = "not_sent"
"""Stored as `sale_status` when the worker that submitted the attempt is certain it sent no sale."""

_ENDED_UNPAID = frozenset({AttemptStatus.DECLINED, AttemptStatus.NOT_CHARGED})


def was_never_sold(attempt: Attempt) -> bool:
    """Whether no sale was sent. Its gateway invoice then stays pending until it expires."""
    return attempt.submitted_at is None or attempt.sale_status == NOT_SENT


def ended_unproven(attempt: Attempt) -> bool:
    """Whether our own sale may have arrived and expired without a refusal."""
    is_ours = attempt.origin is not Origin.LINK and not was_never_sold(attempt)
    return attempt.status is AttemptStatus.NOT_CHARGED and is_ours and attempt.resolved_at is None


def not_before(origin: Origin, ended: Iterable[Attempt], timings: Timings) -> datetime | None:
    """Return the earliest time for the next attempt of an invoice, or None for now.

    `origin` is that of the next attempt; `ended` are the invoice's ended attempts.
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
