"""A circuit breaker: tells trouble that meets every charge from trouble of one invoice.

One for each process, in memory. A charge passes when it ends with a result, whatever the result; it
fails when it raises.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from billing_worker.clock import Clock
from billing_worker.domain.attempt import Attempt

OPENS_AFTER = 5
"""So many different invoices fail one after the other, and none passes: nothing more is started.
As many that fail in the same way are a fault of ours, although others pass: no row is blamed."""

PROBES_EVERY_SECONDS = 10.0
"""While nothing is started, one charge is tried this often, to find out whether it is mended."""

OFFERS = 20
"""Invoices that are offered for one trial: some may have been charged by another worker."""

REMEMBERED_FAILURES = 1_000
KEPT_BACK = 100_000
"""Bound the memory of a process. What is forgotten here, the sweeps find."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one failed charge means."""

    innocent: tuple[Attempt, ...]  # one claim of each is not counted against it
    is_first: bool  # nothing else fails in this way
    opened: bool  # from now on nothing more is started


@dataclass(slots=True)
class _Failing:
    kind: str
    counted: list[Attempt] = field(default_factory=list)


class CircuitBreaker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: dict[int, _Failing] = {}  # by invoice id
        self._in_a_row: set[int] = set()  # began to fail since a charge passed
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
        """What may be claimed: one page of all. While open: now and then several offers, of which
        the first that can be claimed is enough. The others are kept back until a charge passes.
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
        """At random, and first what has not failed yet: another currency may pass."""
        untried = sorted(self._kept_back - self._failing.keys()) or sorted(self._kept_back)
        return self._random.sample(untried, min(OFFERS, len(untried)))

    def gone(self, invoice_ids: Sequence[int]) -> None:
        """Offered in vain: another worker has charged them, or is about to."""
        with self._lock:
            self._kept_back.difference_update(invoice_ids)

    def passed(self, invoice_id: int) -> list[int] | None:
        """A charge has ended with a result. Returns what was kept back, if that closes it."""
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
        """A charge has raised. `kind` tells how, in the same words for the same fault.

        `blameless`: such a failure is never the row's. `key`: no vault key fits, and that meets
        every row, unless a charge has passed in this process, which needs a key that fits.
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
            # One that goes on failing says nothing about the others.
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
        """The database could not be told: the next verdict says it again."""
        with self._lock:
            for attempt in attempts:
                failing = self._failing.setdefault(attempt.invoice_id, _Failing("not written"))
                failing.counted.append(attempt)
