"""The shared cap on requests per second of all workers on all machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

import redis

from billing_worker.clock import Clock, SystemClock

Meanwhile = Callable[[], None]


class Pace(Protocol):
    def wait(self, n: int = 1, meanwhile: Meanwhile | None = None) -> None:
        """Block until `n` more requests may be sent. Raises only what `meanwhile` raises.

        The longest wait is the number of permits that others took before, divided by the cap. Take
        the permits of a sale before its commit, because the sale must follow its commit within
        seconds.

        A long wait calls `meanwhile` every quarter of a second. If that raises, the wait ends and
        the permits are lost.
        """
        ...


class Unlimited:
    def wait(self, n: int = 1, meanwhile: Meanwhile | None = None) -> None:
        """Return at once: no cap is configured."""


Sleep = Callable[[float], None]

_SLICE_SECONDS: Final = 0.25


def _wait_out(sleep: Sleep, seconds: float, meanwhile: Meanwhile | None) -> None:
    if meanwhile is None:
        sleep(seconds)
        return
    while seconds > 0:
        sleep(min(seconds, _SLICE_SECONDS))
        seconds -= _SLICE_SECONDS
        meanwhile()


LONGEST_LEAD_SECONDS: Final = 60
"""How far ahead permits are given out. A caller that finds this minute full asks again later.

So no permit lies more than two minutes ahead. If one does, Redis' clock was set back, and the
script starts again from now instead of waiting until the clock has caught up.
"""

# GCRA: the key holds the microsecond at which the next request is due. The script uses the clock of
# Redis, because the workers' clocks differ. It returns the wait in microseconds; -1: minute full.
_RESERVE: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local cost, longest_lead = tonumber(ARGV[1]), tonumber(ARGV[2])
local lead = math.max((tonumber(redis.call('GET', KEYS[1]) or '') or now) - now, 0)
if lead > 2 * longest_lead then lead = 0 end
if lead > longest_lead then return -1 end
local due = string.format('%.0f', now + lead + cost)
redis.call('SET', KEYS[1], due, 'PX', math.ceil((lead + cost) / 1000))
return lead
"""


_FULL: Final = -1


class RedisPace:
    """One cap for all processes that share a Redis and a `key`.

    Requests are spaced evenly. `wait(n)` releases n requests together, and the next caller waits
    for all of them. When Redis does not answer, each process applies the cap alone: charging
    continues, and never without a cap.
    """

    ASK_REDIS_AGAIN_AFTER_SECONDS: Final = 5.0

    def __init__(
        self,
        client: redis.Redis,
        per_second: float,
        *,
        key: str = "billing:gateway:due",
        clock: Clock | None = None,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._reserve = client.register_script(_RESERVE)
        self._key = key
        self._microseconds_each = 1_000_000 / per_second
        self._sleep = sleep
        self._monotonic = (clock or SystemClock()).monotonic
        self._alone = LocalPace(per_second, clock=clock, sleep=sleep)
        self._ask_again_at = self._monotonic()

    def wait(self, n: int = 1, meanwhile: Meanwhile | None = None) -> None:
        """Block until the permits that others took before are used up at the rate of the cap."""
        cost = round(n * self._microseconds_each)
        while (microseconds := self._reserve_at_redis(cost)) == _FULL:
            _wait_out(self._sleep, LONGEST_LEAD_SECONDS / 2, meanwhile)
        if microseconds is None:
            self._alone.wait(n, meanwhile)
        elif microseconds > 0:
            _wait_out(self._sleep, microseconds / 1_000_000, meanwhile)

    def _reserve_at_redis(self, cost: int) -> int | None:
        """Return the microseconds to wait, or _FULL; None while Redis does not answer."""
        if self._monotonic() < self._ask_again_at:
            return None
        try:
            answer = self._reserve(keys=[self._key], args=[cost, LONGEST_LEAD_SECONDS * 1_000_000])
        except redis.RedisError:
            # Each failed attempt costs a socket timeout, which not every charge should pay.
            self._ask_again_at = self._monotonic() + self.ASK_REDIS_AGAIN_AFTER_SECONDS
            return None
        return int(answer)


class LocalPace:
    """The cap of one process, shared by its threads."""

    def __init__(
        self, per_second: float, *, clock: Clock | None = None, sleep: Sleep = time.sleep
    ) -> None:
        self._seconds_each = 1 / per_second
        self._sleep = sleep
        self._monotonic = (clock or SystemClock()).monotonic
        self._due = self._monotonic()
        self._lock = threading.Lock()

    def wait(self, n: int = 1, meanwhile: Meanwhile | None = None) -> None:
        """Block until this process's earlier permits are used up at the rate of the cap."""
        with self._lock:
            now = self._monotonic()
            seconds = max(self._due - now, 0.0)
            self._due = now + seconds + n * self._seconds_each
        if seconds > 0:
            _wait_out(self._sleep, seconds, meanwhile)
