"""All debits and requests of the sandbox, to compare the client's records with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from billing_worker.sandbox import wire

Operation = Literal["create", "find", "look", "sale"]
_OPERATIONS: tuple[Operation, ...] = ("create", "find", "look", "sale")


@dataclass(frozen=True, slots=True)
class Debit:
    """One debit of a customer's card. The amount is exact, in major units.

    `reference_id` is that of the order, even if the gateway states another one.
    """

    reference_id: str
    gateway_id: str
    customer_reference_id: str
    amount: Decimal
    currency: str
    at: datetime
    test_mode: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "reference_id": self.reference_id,
            "gateway_id": self.gateway_id,
            "customer_reference_id": self.customer_reference_id,
            "amount": wire.number(self.amount),
            "currency": self.currency,
            "at": self.at.isoformat(),
            "test_mode": self.test_mode,
        }


class Ledger:
    """All debits in order of time. Debits are only ever added."""

    def __init__(self) -> None:
        self._debits: list[Debit] = []
        self._by_reference: defaultdict[str, list[Debit]] = defaultdict(list)

    def record(self, debit: Debit) -> None:
        self._debits.append(debit)
        self._by_reference[debit.reference_id].append(debit)

    def __len__(self) -> int:
        return len(self._debits)

    def __iter__(self) -> Iterator[Debit]:
        return iter(tuple(self._debits))

    def debits_for(self, reference_id: str) -> tuple[Debit, ...]:
        return tuple(self._by_reference.get(reference_id, ()))

    def by_reference(self) -> dict[str, tuple[Debit, ...]]:
        # From a snapshot, because another thread may record at the same time.
        return {debit.reference_id: self.debits_for(debit.reference_id) for debit in self}

    def totals(self) -> dict[str, Decimal]:
        """Return the exact sum per currency."""
        sums: defaultdict[str, Decimal] = defaultdict(Decimal)
        for debit in self:
            sums[debit.currency] += debit.amount
        return dict(sums)

    def as_json(self) -> dict[str, Any]:
        return {
            "debits": [debit.as_json() for debit in self],
            "totals": {currency: wire.number(total) for currency, total in self.totals().items()},
        }


class Requests:
    """How often each operation was requested, whatever its result."""

    def __init__(self) -> None:
        self._total: Counter[Operation] = Counter()
        self._by_reference: defaultdict[str, Counter[Operation]] = defaultdict(Counter)

    def count(self, operation: Operation, reference_id: str | None) -> None:
        """Count a request. Without a `reference_id` (no known invoice) it counts in total only."""
        self._total[operation] += 1
        if reference_id is not None:
            self._by_reference[reference_id][operation] += 1

    def total(self, operation: Operation) -> int:
        return self._total[operation]

    def for_reference(self, operation: Operation, reference_id: str) -> int:
        counts = self._by_reference.get(reference_id)
        return counts[operation] if counts else 0

    def as_json(self) -> dict[str, Any]:
        return {
            "operations": _spell_out(self._total),
            "references": {
                reference: _spell_out(counts) for reference, counts in self._by_reference.items()
            },
        }


def _spell_out(counts: Counter[Operation]) -> dict[str, int]:
    return {operation: counts[operation] for operation in _OPERATIONS}
