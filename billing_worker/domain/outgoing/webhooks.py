"""When an event goes to a receiver again, and what an answer means."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

DAY: Final = timedelta(days=1)

Waits = tuple[timedelta, ...]

USUAL_WAITS: Final[Waits] = tuple(
    timedelta(seconds=seconds)
    for seconds in (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
)
"""Before each try, from the end of the one before it (Standard Webhooks 1.0)."""

MOST_RETRY_AFTER: Final = DAY


@dataclass(frozen=True, slots=True)
class NextTry:
    at: datetime
    parked: bool
    """Tried once a day until somebody replays it, and never dropped."""


def is_delivered(status: int | None) -> bool:
    return status is not None and HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES


def next_try(waits: Waits, tries: int, now: datetime, retry_after: str | None) -> NextTry:
    """After `tries` tries in vain. A receiver may ask for more time, a day at most."""
    parked = tries >= len(waits)
    wait = DAY if parked else waits[tries]
    return NextTry(now + max(wait, _asked_for(retry_after, now)), parked)


def _asked_for(header: str | None, now: datetime) -> timedelta:
    """Seconds or a date (RFC 9110, 10.2.3). What cannot be read asks for nothing."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return min(timedelta(seconds=int(text[:9])), MOST_RETRY_AFTER)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return timedelta(0)
    if at.tzinfo is None:
        return timedelta(0)
    return min(max(at - now, timedelta(0)), MOST_RETRY_AFTER)


def in_words(status: int | None, reason: str | None) -> str | None:
    """Why a try counts as failed; None: it was delivered."""
    if is_delivered(status):
        return reason
    if status is None:
        return reason or "no answer"
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return f"{status}: a redirect, not followed"
    return f"answered {status}"
