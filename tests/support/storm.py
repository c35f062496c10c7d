"""Real workers, beats, gateway, Redis and PostgreSQL in bad weather, and the calm after it."""

from __future__ import annotations

import heapq
import itertools
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import requests
from cryptography.fernet import Fernet
from sqlalchemy import and_, func, not_, select

from billing_worker.clock import SystemClock
from billing_worker.domain.secret import Secret
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.doorbell import POLL_LOST_AFTER
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.postgres import EmbeddedPostgres
from tests.support.processes import CELERY, CLI, Process, eventually
from tests.support.reckoning import FATES, KEPT_UNKNOWN, UNRESOLVED, Reckoning
from tests.support.redis_server import RedisServer
from tests.support.replication import ReplicatedPostgres
from tests.support.weather import (
    BEATS,
    DAY,
    GATEWAY_TIMEOUT_SECONDS,
    HOUR,
    LEASE_SECONDS,
    WORKERS,
    Gust,
)
from tests.support.world import KEY

LAUNCHER = Path(__file__).with_name("stepping_worker.py")

STARTS_WITHIN = 90.0
"""Seconds for a process to start. The machine may be busy; whoever waits goes on at once."""

CALM_WITHIN = 150.0

LATER = 3 * HOUR
"""How much later the calm comes: what a wrong clock dated an hour ahead is due by then, and so is
the first re-asking of what the gateway called final."""

WRONG_KEY = Fernet.generate_key().decode()

WEIGHTS = {"approved": 30, "slow": 3}
"""How often a card token is dealt; the other outcomes weigh 1."""


class Gateway:
    """`billing-worker sandbox` as a process: it may freeze, but it must not forget its ledger."""

    def __init__(self, folder: Path) -> None:
        arguments = ["sandbox", "--port", "0", "--json", "--second-sale", "charge"]
        # An invoice outlives a frozen worker sometimes, and sometimes not.
        arguments += ["--lifetime", "5", "--later", "2"]
        self.process = Process([*CLI, *arguments], {}, folder / "gateway.log")
        try:
            line = eventually(self._first_line, STARTS_WITHIN, why="the gateway starts")
            self.facts = json.loads(line)
            self.behave(slow_seconds=1)
        except BaseException:
            self.process.kill()
            raise

    def _first_line(self) -> str:
        line, newline, _ = self.process.output.partition("\n")
        return line if newline else ""

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    def read(self, page: str) -> Any:
        return self._answer("GET", page)

    def behave(self, **changes: object) -> None:
        self.process.signal(signal.SIGCONT)  # frozen, it would not listen
        self._answer("POST", "behaviour", json=changes)

    def _answer(self, method: str, page: str, **options: Any) -> Any:
        url = f"{self.url}/_sandbox/{page}"
        answer = requests.request(method, url, timeout=STARTS_WITHIN, **options)
        answer.raise_for_status()
        return answer.json()


class Storm:
    """One seed. `rage` does what the forecast says, `calm` waits for the end, `reckon` compares."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        postgres: EmbeddedPostgres | ReplicatedPostgres,
        url: str,
        redis: RedisServer,
        beside: Storm | None = None,
    ) -> None:
        """`beside`: another merchant's storm, whose account at the gateway this book shares."""
        self.seed = seed
        self.folder = folder
        self.postgres = postgres
        self.redis = redis
        self.log: list[str] = []
        self.quiet = True
        self.gusts: Counter[str] = Counter()
        self.tokens: dict[str, str] = {}
        self.store = Store(url)
        self.beside = beside
        self.is_shared = beside is not None
        if beside:
            beside.is_shared = True
        self.gateway = beside.gateway if beside else Gateway(folder)
        self.workers = ("other worker",) if beside else WORKERS
        self.beats = ("other beat",) if beside else BEATS
        self.customers = "other-customer-" if beside else "customer-"
        self._began = time.monotonic()
        self._born = itertools.count()
        self._running: dict[str, Process] = {}
        self._ends: list[tuple[float, int, str, Callable[[], None]]] = []
        self._deserters: list[str] = []
        self._settings = {
            "BILLING_DATABASE_URL": url,
            "BILLING_REDIS_URL": redis.url.removesuffix("/0") + ("/1" if beside else "/0"),
            "BILLING_GATEWAY_URL": f"{self.gateway.url}/api",
            "BILLING_CARDGATE_URL": self.gateway.url,
            "BILLING_GATEWAY_USERNAME": self.gateway.facts["username"],
            "BILLING_GATEWAY_PASSWORD": self.gateway.facts["password"],
            "BILLING_TEST_MODE": "true",
            "BILLING_VAULT_KEYS": KEY,
            "BILLING_GATEWAY_TIMEOUT_SECONDS": str(GATEWAY_TIMEOUT_SECONDS),
            # The shared cap is kept in Redis: what becomes of it there must not matter.
            "BILLING_GATEWAY_MAX_REQUESTS_PER_SECOND": "300",
            "BILLING_CHARGE_CONCURRENCY": "32",
            "BILLING_RENEW_EVERY_SECONDS": "1",
            "BILLING_RECONCILE_EVERY_SECONDS": "1",
            "BILLING_RECONCILE_AFTER_SECONDS": "1",
            "BILLING_STUCK_AFTER_SECONDS": str(LEASE_SECONDS),
            "BILLING_EXPIRY_GRACE_SECONDS": "2",
            "BILLING_NOT_CHARGED_RETRY_SECONDS": "2",
            "BILLING_EXPIRED_RETRY_SECONDS": "4",
        }

    # --- who takes part ----------------------------------------------------------------------

    def gather(self, subscriptions: int, seconds: float) -> None:
        """Start everybody, then deal cards whose first period begins at some moment of the storm."""
        for name in self.workers:
            self._start_worker(name)
        for name in self.beats:
            self._start_beat(name)
        for name in self.workers:
            self._ready(name)
        draw = random.Random(self.seed)
        outcomes = [name for name in FATES for _ in range(WEIGHTS.get(name, 1))]
        now = SystemClock().now()
        records = []
        for number in range(1, subscriptions + 1):
            token = f"{draw.choice(outcomes)}.{number}"
            self.tokens[f"sub-{number}-p0"] = token
            due = now + timedelta(seconds=draw.uniform(-1, seconds))
            records.append(_record(number, token, due, self.customers))
        subscribe(self.store, FernetVault(Secret(KEY)), SystemClock(), records, by="test")
        self._note(f"{subscriptions} subscriptions become due within {seconds:.0f} s")

    def _start_worker(self, name: str, *, step: int = 0, **settings: str) -> None:
        self._set_clock(name, step)
        options = ["worker", "-n", f"{name}@storm", "--without-gossip", "--without-mingle"]
        command = [sys.executable, str(LAUNCHER), "-A", "billing_worker", *options, "-l", "INFO"]
        self._start(name, command, settings | {"STORM_CLOCK": str(self._clock_of(name))})

    def _start_beat(self, name: str) -> None:
        self._start(name, [*CELERY, "beat", "-l", "INFO"], {})

    def _start(self, name: str, command: list[str], settings: Mapping[str, str]) -> None:
        log = self.folder / f"{name}-{next(self._born)}.log"
        self._running[name] = Process(command, self._settings | dict(settings), log)

    def _ready(self, name: str) -> Process:
        """The weather waits for a process that is still starting: it shall hit somebody at work."""
        sign = "ready." if name in self.workers else "beat: Starting"

        def ready() -> bool:
            self._end_what_is_over()  # it may wait for a server that is down, or be replaced
            return sign in self._running[name].output

        eventually(ready, STARTS_WITHIN, why=f"{name} starts")
        return self._running[name]

    def _clock_of(self, name: str) -> Path:
        return self.folder / f"{name}.clock"

    def _set_clock(self, name: str, step: float) -> None:
        fresh = self.folder / f"{name}.clock.new"
        fresh.write_text(str(step))
        fresh.replace(self._clock_of(name))  # at once: its reader never sees half a number

    # --- bad weather -------------------------------------------------------------------------

    def rage(self, gusts: list[Gust]) -> None:
        for gust in gusts:
            self._wait(gust.after)
            self._report_deserters()
            self._note(str(gust))
            self.gusts[gust.kind] += 1
            self._blow(gust)
        while self._ends:
            self._wait(max(0.0, self._ends[0][0] - time.monotonic()))

    def _wait(self, seconds: float) -> None:
        """The storm's own pace, not a guess at anybody's: what has lasted long enough ends."""
        until = time.monotonic() + seconds
        while self._ends and self._ends[0][0] <= until:
            time.sleep(max(0.0, self._ends[0][0] - time.monotonic()))
            self._end_what_is_over()
        time.sleep(max(0.0, until - time.monotonic()))

    def _end_what_is_over(self) -> None:
        while self._ends and self._ends[0][0] <= time.monotonic():
            _, _, what, end = heapq.heappop(self._ends)
            self._note(what)
            end()

    def _lasting(self, gust: Gust, what: str, end: Callable[[], None]) -> None:
        due = time.monotonic() + gust.lasts
        heapq.heappush(self._ends, (due, next(self._born), what, end))

    def _blow(self, gust: Gust) -> None:
        subject = gust.kind.partition(" ")[0]
        {
            "worker": self._on_a_worker,
            "clock": self._on_a_clock,
            "wrong": self._on_a_key,
            "beat": self._on_a_beat,
            "redis": self._on_redis,
            "postgres": self._on_postgres,
            "gateway": self._on_the_gateway,
        }[subject](gust)

    def _on_a_worker(self, gust: Gust) -> None:
        process = self._ready(gust.target)
        if gust.kind == "worker frozen":
            self._freeze(process, gust)
        else:
            process.kill()
            self._start_worker(gust.target)

    def _on_a_clock(self, gust: Gust) -> None:
        self._set_clock(gust.target, gust.step)
        right = f"the clock of {gust.target} is right again"
        self._lasting(gust, right, lambda: self._set_clock(gust.target, 0))

    def _on_a_key(self, gust: Gust) -> None:
        self._ready(gust.target).kill()
        self._start_worker(gust.target, BILLING_VAULT_KEYS=WRONG_KEY)
        right = f"{gust.target} has the right key again"
        self._lasting(gust, right, lambda: self._replace_worker(gust.target))

    def _on_a_beat(self, gust: Gust) -> None:
        self._ready(gust.target).kill()
        self._start_beat(gust.target)

    def _on_redis(self, gust: Gust) -> None:
        if gust.kind == "redis flushed":
            self.redis.start()  # if it is down just now
            self.redis.wipe()
        else:
            self._end_redis(gust)

    def _on_postgres(self, gust: Gust) -> None:
        match gust.kind:
            case "postgres crashed":
                self.postgres.stop(immediate=True)
                self._lasting(gust, "postgres is back", self.postgres.start)
            case "postgres restarted":
                self.postgres.start()  # if it is down just now
                self.postgres.restart()
            case "postgres fails over":
                self._lose_the_primary(gust)

    def _on_the_gateway(self, gust: Gust) -> None:
        if gust.kind == "gateway frozen":
            self._freeze(self.gateway.process, gust)
        else:
            self.gateway.behave(latency_seconds=0.4)
            fast = "the gateway is fast again"
            self._lasting(gust, fast, lambda: self.gateway.behave(latency_seconds=0))

    def _replace_worker(self, name: str) -> None:
        self._running[name].kill()
        self._start_worker(name)

    def _lose_the_primary(self, gust: Gust) -> None:
        """What is committed from now on until the end of the gust is forgotten."""
        pair = self.postgres
        assert isinstance(pair, ReplicatedPostgres)
        if pair.is_cut_off:  # one at a time
            return
        pair.start()  # if it is down just now
        pair.cut_off()
        self._lasting(gust, "the standby is the primary", lambda: _fail_over(pair))

    def _freeze(self, process: Process, gust: Gust) -> None:
        process.signal(signal.SIGSTOP)
        thawed = f"{gust.target or 'the gateway'} goes on"
        self._lasting(gust, thawed, lambda: _thaw(process))

    def _end_redis(self, gust: Gust) -> None:
        if self.redis.running:
            self.redis.kill()
        if gust.kind == "redis lost":
            shutil.rmtree(self.redis.folder / "appendonlydir", ignore_errors=True)
        self._lasting(gust, "redis is back", self.redis.start)

    def _report_deserters(self) -> None:
        """Nobody may end by itself, whatever the weather."""
        for name, process in self._running.items():
            status = process.status
            if status is not None:
                self._note(f"{name} has ended by itself with status {status}")
                self._deserters.append(f"{name} ended by itself ({status}), see {process.log}")
        for name in [name for name, process in self._running.items() if process.status is not None]:
            self._start_worker(name) if name in self.workers else self._start_beat(name)

    # --- the calm ----------------------------------------------------------------------------

    def calm(self) -> None:
        """One worker and one beat, some hours later, until nothing is left to be done."""
        self._report_deserters()
        self.kill_everybody()
        self.redis.wipe()
        self.gateway.behave(lifetime_seconds=3)
        # What was not charged is tried again on the next day, and not every two seconds.
        self._start_worker(
            "calm",
            step=LATER,
            STORM_CLOCK_IS_BELIEVED="true",
            BILLING_NOT_CHARGED_RETRY_SECONDS=str(DAY),
            BILLING_EXPIRED_RETRY_SECONDS=str(DAY),
        )
        self._start_beat("calm-beat")
        self._note("calm")
        later = self._until_quiet(float(LATER))
        later = self._until_quiet(self._pass(later + DAY + HOUR))
        # What the gateway called final on that day is asked about once more: money may come late.
        self._until_quiet(self._pass(later + HOUR + 60))

    def _until_quiet(self, later: float) -> float:
        """How late it is in the end: where nothing is due for long, time is made to pass."""
        deadline = time.monotonic() + CALM_WITHIN
        while left := self._left_to_do(later):
            if time.monotonic() > deadline:
                self._note(f"never quiet: {left}")
                self.quiet = False
                break
            later = self._pass(self._next_date(later))
            time.sleep(0.3)
        self._note(f"quiet, {later / HOUR:.2f} h later" if self.quiet else "given up")
        return later

    def _pass(self, later: float) -> float:
        self._set_clock("calm", later)
        return later

    def _left_to_do(self, later: float) -> dict[str, int]:
        # A sweep that rings puts the date off until the message must have been lost: not yet done.
        by = SystemClock().now() + timedelta(seconds=later) + POLL_LOST_AFTER + timedelta(seconds=5)
        questions = {
            "subscriptions due": tables.subscriptions.c.next_billing_at <= by,
            "invoices to ring for": tables.invoices.c.enqueue_at <= by,
            "attempts to ask about": and_(tables.attempts.c.next_poll_at <= by, not_(KEPT_UNKNOWN)),
            "attempts without an end": UNRESOLVED,
        }
        with self.store.reading() as connection:
            left = {
                what: connection.execute(select(func.count()).where(that)).scalar_one()
                for what, that in questions.items()
            }
        return {what: count for what, count in left.items() if count}

    def _next_date(self, later: float) -> float:
        """How late it must be for the next step of an attempt without an end: now, or far off."""
        now = SystemClock().now()
        date = func.min(
            func.coalesce(tables.attempts.c.next_poll_at, tables.attempts.c.lease_until)
        )
        with self.store.reading() as connection:
            following = connection.execute(select(date).where(UNRESOLVED)).scalar_one()
        if following is None or following < now + timedelta(seconds=later + 20):
            return later
        return float((following - now).total_seconds()) + 1

    def kill_everybody(self) -> None:
        for process in self._running.values():
            process.kill()
        self._running.clear()

    def close(self) -> None:
        self.kill_everybody()
        self.store.close()
        if self.beside is None:
            self.gateway.process.kill()
            self.postgres.start()

    # --- what came of it ---------------------------------------------------------------------

    def reckon(self) -> Reckoning:
        books = Reckoning.read(self.store)
        debits = [
            debit
            for debit in self.gateway.read("ledger")["debits"]
            if debit["customer_reference_id"].startswith(self.customers)
        ]
        asked = self.gateway.read("requests")
        books.compare(self.tokens, debits, asked, shared=self.is_shared)
        books.violations += self._deserters + list(self._crashes_in_the_logs())
        if not self.quiet:
            books.violations += [line for line in self.log if "never quiet" in line]
        return books

    def _crashes_in_the_logs(self) -> Iterator[str]:
        for log in sorted(self.folder.glob("*.log")):
            for line in log.read_text(errors="replace").splitlines():
                if "charge.crashed" in line or "InvariantBroken" in line:
                    yield f"{log.name}: {line[:1500]}"

    def _note(self, what: str) -> None:
        self.log.append(f"{time.monotonic() - self._began:7.2f} {what}")


def _fail_over(pair: ReplicatedPostgres) -> None:
    pair.fail_over()
    pair.add_standby()


def _thaw(process: Process) -> None:
    if process.status is None:
        process.signal(signal.SIGCONT)


def _record(number: int, token: str, due: datetime, customers: str) -> Any:
    return parse_record(
        {
            "reference_id": f"sub-{number}",
            "customer": {"reference_id": f"{customers}{number}"},
            "card": {"token": token},
            "amount": "9.99",
            "currency": "USD",
            "interval": "month",
            "anchor_at": due.isoformat(),
        }
    )
