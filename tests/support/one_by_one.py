"""The pool and the group commit of a process with one thread: one item, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from billing_worker.services.attempts.group_commit import Answer, Request, Work
from billing_worker.services.ports import Ports, R, T


class OneByOne:
    """No threads: for simulations, where every interleaving is chosen."""

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return [work(item) for item in items]

    def take(self, work: Callable[[T], R], found: Callable[[], Sequence[T]]) -> list[R]:
        return self.map(work, found())


class EachAlone:
    """Every request in a transaction of its own: for simulations and single-threaded use."""

    def __call__(self, work: Work[Request, Answer], ports: Ports, request: Request) -> Answer:
        return work(ports, [request])[0]
