"""The product's embedded Redis, plus the ways in which a test mistreats it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from billing_worker.entrypoints.local.embedded_redis import EmbeddedRedis


class RedisServer(EmbeddedRedis):
    """Start one per test process and `wipe` it between tests: a start costs more than a wipe."""

    def wipe(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def kill(self) -> None:
        """As the kernel does when memory runs out. `start` brings it back, same port and data."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait_for_its_end()

    def restart(self) -> None:
        self.stop()
        self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stay open, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def _wait_for_its_end(self) -> None:
        if self._process is not None:
            self._process.wait(5)
