"""Many charges in one process: threads that mostly wait for the gateway."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ThreadPool:
    """Shares `size` threads among all batches of this process."""

    def __init__(self, size: int) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="charge")
        self._leaving = threading.Event()
        self._turn = threading.Lock()
        self._room = threading.Condition()
        self._waiting = 0
        self._enough = max(1, size // 2)

    def take(self, work: Callable[[T], R], found: Callable[[], Sequence[T]]) -> list[R]:
        """Run `map` over the items of `found`, which is called only when threads are about to be
        free.

        Items that are claimed under a lease then begin at once, instead of waiting while others
        could take them. One caller at a time calls `found`.
        """
        with self._turn:
            with self._room:
                self._room.wait_for(lambda: self._waiting < self._enough)
            futures = self._submit(work, [] if self._leaving.is_set() else found())
        return self._results(futures)

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return results of the items that began, in order, after all of them have ended.

        After `leave` no further item begins: the sweep finds an attempt that is only prepared,
        which is safer than a sale during shutdown.
        """
        return self._results(self._submit(work, items))

    def _submit(self, work: Callable[[T], R], items: Sequence[T]) -> list[Future[R]]:
        with self._room:
            self._waiting += len(items)
        return [self._pool.submit(self._begin, work, item) for item in items]

    def _results(self, futures: Sequence[Future[R]]) -> list[R]:
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
        with self._room:
            self._waiting -= 1
            self._room.notify()
        if self._leaving.is_set():
            raise _Leaving
        return work(item)

    def leave(self) -> None:
        self._leaving.set()


class _Leaving(Exception):
    pass
