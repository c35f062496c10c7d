"""A circuit breaker: distinguishes errors of every charge from errors of one invoice.

One per process, in memory. A charge passes if it ends with any result; it fails if it raises.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from billing_worker.clock import Clock
from billing_worker.domain.attempt import Attempt

OPENS_AFTER = 5
"""After so many different invoices fail in a row, no charge starts. So many equal failures are a
fault of ours, even if other charges pass: they count against no row.
"""

PROBES_EVERY_SECONDS = 10.0
"""While charging is stopped, one charge is tried this often."""

OFFERS = 20
"""Invoices that are offered for one trial: another worker may have charged some."""

REMEMBERED_FAILURES = 1_000
KEPT_BACK = 100_000
"""Limits the memory of a process. The sweeps find what is dropped here."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The meaning of one failed charge."""

    innocent: tuple[Attempt, ...]  # one claim of each does not count
    is_first: bool  # no other charge fails in this way
    opened: bool  # charging stops now


@dataclass(slots=True)
class _Failing:
    kind: str
    counted: list[Attempt] = field(default_factory=list)


class CircuitBreaker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: dict[int, _Failing] = {}  # by invoice id
        self._in_a_row: set[int] = set()  # first failures since a charge passed
        self._has_passed = False
        self._is_open = False
        self._next_probe_at = 0.0
        self._kept_back: set[int] = set()
        self._random = Random(0)  # noqa: S311 - spreads the trials, guards nothing

    @property
    def is_open(self) -> bool:
        return self._is_open

    def open(self, now: float) -> None:
        with self._lock:
            self._is_open = True
            self._next_probe_at = now + PROBES_EVERY_SECONDS

    def admitted(self, invoice_ids: Sequence[int], clock: Clock) -> list[list[int]]:
        """Return what may be claimed: the batch.

        While open: from time to time a few offers, of which the first claimable one is enough. The
        others wait until a charge passes.
        """
        with self._lock:
            if not self._is_open:
                return [list(invoice_ids)] if invoice_ids else []
            if len(self._kept_back) < KEPT_BACK:
                self._kept_back.update(invoice_ids)
            now = clock.monotonic()
            if now < self._next_probe_at:
                return []
            self._next_probe_at = now + PROBES_EVERY_SECONDS
            return [[invoice_id] for invoice_id in self._offers()]

    def _offers(self) -> list[int]:
        """Return offers at random, first those that have not failed: another currency may pass."""
        untried = sorted(self._kept_back - self._failing.keys()) or sorted(self._kept_back)
        return self._random.sample(untried, min(OFFERS, len(untried)))

    def gone(self, invoice_ids: Sequence[int]) -> None:
        """Drop offers that another worker has charged or is about to charge."""
        with self._lock:
            self._kept_back.difference_update(invoice_ids)

    def passed(self, invoice_id: int) -> list[int] | None:
        """Record that a charge ended with a result. If that closes the breaker, returns the waiting
        invoices.
        """
        with self._lock:
            self._has_passed = True
            self._failing.pop(invoice_id, None)
            self._in_a_row.clear()
            if not self._is_open:
                return None
            self._is_open = False
            kept_back, self._kept_back = sorted(self._kept_back), set()
            return kept_back

    def failed(
        self, attempt: Attempt, kind: str, now: float, *, blameless: bool = False, key: bool = False
    ) -> Verdict:
        """Record that a charge raised. `kind` is the same text for the same fault.

        `blameless`: such a failure is never the row's. `key`: no vault key fits; that affects every
        row, unless a charge has passed in this process, which needs a key that fits.
        """
        with self._lock:
            is_first = all(one.kind != kind for one in self._failing.values())
            self._remember(attempt, kind)
            wrong_keys = key and not self._has_passed
            innocent = self._innocent(attempt, kind, blameless=blameless or wrong_keys)
            opens = wrong_keys or len(self._in_a_row) >= OPENS_AFTER
            opened, self._is_open = opens and not self._is_open, opens or self._is_open
            if opened:
                self._next_probe_at = now + PROBES_EVERY_SECONDS
            return Verdict(tuple(innocent), is_first, opened)

    def _remember(self, attempt: Attempt, kind: str) -> None:
        if attempt.invoice_id not in self._failing:
            # A charge that fails again says nothing about the others.
            self._in_a_row.add(attempt.invoice_id)
        failing = self._failing.setdefault(attempt.invoice_id, _Failing(kind))
        failing.kind = kind
        failing.counted.append(attempt)
        if len(self._failing) > REMEMBERED_FAILURES:
            del self._failing[next(iter(self._failing))]

    def _innocent(self, attempt: Attempt, kind: str, *, blameless: bool) -> list[Attempt]:
        failing = self._failing
        alike = {row for row, one in failing.items() if one.kind == kind}
        rows = {attempt.invoice_id} if blameless else set()
        if attempt.invoice_id in self._in_a_row and len(self._in_a_row) > 1:
            rows |= self._in_a_row & failing.keys()
        if len(alike) >= OPENS_AFTER:
            rows |= alike
        innocent = [one for row in rows for one in failing[row].counted]
        for row in rows:
            failing[row].counted = []
        return innocent

    def still_counted(self, attempts: Sequence[Attempt]) -> None:
        """Keep what could not be written: the next verdict repeats it."""
        with self._lock:
            for attempt in attempts:
                failing = self._failing.setdefault(attempt.invoice_id, _Failing("not written"))
                failing.counted.append(attempt)
