"""Many charges at once in one thread, always in the same order: for long simulations.

Stands for the worker's threads and their group commit. Every charge of a page runs until it wants
to commit; then one transaction is made for all that wait, as under load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet


@dataclass(slots=True)
class _Charge:
    run: greenlet
    wants: tuple[Any, Any, Any] | None = None  # (work, ports, request)


@dataclass(slots=True)
class Cohort:
    """Both the crew and what makes its commits one."""

    _waiting: list[_Charge] = field(default_factory=list)
    _hub: greenlet | None = None

    def take(self, work: Callable[[Any], Any], found: Callable[[], Sequence[Any]]) -> list[Any]:
        return self.map(work, found())

    def map(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        self._hub = getcurrent()
        results: list[Any] = [None] * len(items)

        def run(index: int, item: Any) -> None:
            results[index] = work(item)

        for index, item in enumerate(items):
            self._go_on(_Charge(greenlet(run)), index, item)
        while self._waiting:
            self._commit()
        self._hub = None
        return results

    def __call__(self, work: Any, ports: Any, request: Any) -> Any:
        if self._hub is None:
            return work(ports, [request])[0]
        return self._hub.switch((work, ports, request))

    def _go_on(self, charge: _Charge, *value: Any) -> None:
        charge.wants = charge.run.switch(*value)
        if not charge.run.dead:
            self._waiting.append(charge)

    def _commit(self) -> None:
        charges, self._waiting = self._waiting, []
        assert charges[0].wants is not None
        work, ports, _ = charges[0].wants
        requests = [charge.wants[2] for charge in charges if charge.wants]
        for charge, result in zip(charges, work(ports, requests), strict=True):
            self._go_on(charge, result)
