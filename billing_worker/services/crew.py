"""Many charges in flight in one process: threads that mostly wait for the gateway."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class OneByOne:
    """No threads: for simulations, where every interleaving is chosen."""

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return [work(item) for item in items]


class Threads:
    """Shares `size` threads among all pages of this process."""

    def __init__(self, size: int) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="charge")
        self._leaving = threading.Event()

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results of the items that were begun, in order, once all of those have ended.

        After `leave` no further item is begun: an attempt that was only prepared is found again
        by the sweep, which is safer than starting a sale while the process is being stopped.
        """
        futures: list[Future[R]] = [self._pool.submit(self._begin, work, i) for i in items]
        results: list[R] = []
        trouble: BaseException | None = None
        for future in futures:
            try:
                results.append(future.result())
            except _Leaving:
                continue
            except BaseException as error:  # noqa: BLE001 - raised below, when all have ended
                trouble = trouble or error
        if trouble is not None:
            raise trouble
        return results

    def _begin(self, work: Callable[[T], R], item: T) -> R:
        if self._leaving.is_set():
            raise _Leaving
        return work(item)

    def leave(self) -> None:
        self._leaving.set()


class _Leaving(Exception):
    pass
