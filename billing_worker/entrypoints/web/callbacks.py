"""`POST /callbacks/payment-invoices`: where the gateway reports news, open to the internet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import structlog
from flask import Blueprint, Response, jsonify, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import RequestEntityTooLarge

from billing_worker.entrypoints.web.addresses import CALLBACKS
from billing_worker.persistence.store import CommitUnknown
from billing_worker.services.charging import callbacks
from billing_worker.services.charging.callbacks import Fate, Inbox

LARGEST_CALLBACK: Final = 1024 * 1024
"""The largest known body has 5 kB; its `callback_logs` may grow a hundred times."""

# The gateway expects exactly 200 and repeats the callback after any other answer (gateway.md §5).
_ANSWERS: Final = {
    Fate.STORED: 200,
    Fate.DUPLICATE: 200,
    Fate.UNREADABLE: 400,
    Fate.FORGED: 401,
    Fate.OTHER_MODE: 401,
    Fate.TOO_LARGE: 413,
    Fate.TOO_MANY: 429,
}

log = structlog.get_logger()


class Limit:
    """A rate limit: `per_second` calls on average and `burst` at once, in this process.

    Each process counts by itself: n web processes allow n times as many.
    """

    def __init__(self, per_second: float, burst: int, monotonic: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._left = float(burst)
        self._monotonic = monotonic
        self._at = monotonic()
        self._turned_away = 0
        self._lock = threading.Lock()

    def allows(self) -> bool:
        with self._lock:
            now = self._monotonic()
            self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
            self._at = now
            if self._left < 1:
                self._turned_away += 1
                return False
            self._left -= 1
            return True

    def turned_away(self) -> int:
        """Return and reset the number of refused calls."""
        with self._lock:
            number, self._turned_away = self._turned_away, 0
            return number


def callback_routes(inbox: Inbox) -> Blueprint:
    """Return the routes. Without a key no callback can be verified, so the route answers 503."""
    routes = Blueprint("callbacks", __name__)
    # Two limits, so that many forged calls do not block the gateway's own.
    genuine = Limit(200, 400, inbox.clock.monotonic)
    forged = Limit(20, 40, inbox.clock.monotonic)

    @routes.post(CALLBACKS)
    def payment_invoices() -> tuple[Response, int]:
        if not inbox.key.reveal():
            return jsonify(error="callbacks are off: BILLING_CALLBACK_SECRET is not set"), 503
        try:
            fate = take()
        except (SQLAlchemyError, CommitUnknown) as error:
            # Perhaps not stored: the gateway repeats it.
            log.warning("callback.not_stored", reason=type(error).__name__)
            return jsonify(error="not stored, try again"), 503
        return jsonify(callback=fate), _ANSWERS[fate]

    def take() -> Fate:
        body = _body()
        signed = body is not None and callbacks.is_genuine(
            inbox, body, request.headers.get("X-Signature")
        )
        limit = genuine if signed else forged
        if not limit.allows():
            return Fate.TOO_MANY
        if number := limit.turned_away():
            callbacks.count(inbox, Fate.TOO_MANY, number)
        if body is None:
            return callbacks.count(inbox, Fate.TOO_LARGE)
        if not signed:
            return callbacks.count(inbox, Fate.FORGED)
        return callbacks.receive(inbox, body)

    return routes


def _body() -> bytes | None:
    """Return the raw bytes, or None if there are too many."""
    request.max_content_length = LARGEST_CALLBACK
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        return None
