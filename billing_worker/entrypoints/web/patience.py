"""Answers of the database or Redis that are waited for, but not for long.

A frozen database answers nothing and refuses nothing: whoever asks it waits as long as it likes. So a
thread asks, and the request waits PATIENCE_SECONDS for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 1.8
"""With what follows, an answer is sent within two seconds."""


class Patient(Generic[T]):
    """Runs `work` in a thread of its own, at most once at a time: whoever asks meanwhile shares its
    result. So a database that hangs costs one thread and one connection, however many ask.

    `kept_seconds`: how long a result is given again. An exception is never kept.
    """

    def __init__(self, work: Callable[[], T], *, kept_seconds: float = 0) -> None:
        self._work = work
        self._kept_seconds = kept_seconds
        self._lock = threading.Lock()
        self._last: Future[T] | None = None
        self._good_until = 0.0

    def begin(self) -> Future[T]:
        """Return the result that is under way or still good, and begin anew if there is none."""
        with self._lock:
            last = self._last
            if last is not None and (not last.done() or time.monotonic() < self._good_until):
                return last
            self._last = future = Future[T]()
        # A daemon: a process that is told to stop does not wait for a frozen database.
        threading.Thread(target=self._run, args=(future,), name="Patient", daemon=True).start()
        return future

    def result(self) -> T:
        """Raises TimeoutError when there is no answer in time, and whatever `work` raises."""
        return self.begin().result(PATIENCE_SECONDS)

    def _run(self, future: Future[T]) -> None:
        try:
            result = self._work()
        except BaseException as error:  # noqa: BLE001 - given to whoever asks
            future.set_exception(error)
        else:
            self._good_until = time.monotonic() + self._kept_seconds
            future.set_result(result)
