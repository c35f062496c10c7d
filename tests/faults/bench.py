"""A database that is emptied quickly, and the runs in it."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import text

from billing_worker.gateway.http import Request, RequestsTransport, Response
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from billing_worker.sandbox.gateway import Behaviour
from billing_worker.sandbox.server import SandboxServer
from tests.faults.boundaries import Outcome, Plan, Run, Scenario
from tests.faults.verdicts import judge
from tests.support.books import name_book
from tests.support.world import START, World


class Bench:
    """One database, reset before every run; engine and compiled statements are kept."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.runs = 0
        self._prepared: dict[str, sqlite3.Connection] = {}
        self.sabotage: tuple[str, ...] = ()
        """SQL that takes a guard out of the database before a run."""

    def run(self, scenario: Scenario, plan: Plan = ()) -> Outcome:
        self.runs += 1
        return self._finish(self.start(scenario, plan), plan)

    def run_on_the_wire(self, scenario: Scenario, plan: Plan = ()) -> Outcome:
        """The same over the real HTTP client and a socket. The clock stands still meanwhile."""
        self.runs += 1
        run = self.start(scenario, plan)
        client = RequestsTransport(read_timeout=5)
        with SandboxServer(run.world.sandbox) as server:

            def carry(request: Request, *, moves_money: bool) -> Response:
                path = request.url.partition("://")[2].partition("/")[2]
                there = replace(request, url=f"{server.url}/{path}")
                return client.send(there, moves_money=moves_money)

            run.carry = carry
            try:
                return self._finish(run, plan)
            finally:
                client.close()

    def world(self, behaviour: Behaviour) -> World:
        """An empty one, for a story."""
        if self.store.is_sqlite:
            self._empty()
        else:
            self._clear()
        return World(self.store, behaviour)

    def forget(self) -> None:
        """Databases that were prepared before the vault was changed are of no use."""
        for key in [key for key in self._prepared if key != "empty"]:
            self._prepared.pop(key).close()

    def _finish(self, run: Run, plan: Plan) -> Outcome:
        with listening() as heard:
            try:
                run.drive(START + run.scenario.horizon)
            except RuntimeError as error:
                run.seen.append(str(error))
        run.seen += heard
        return judge(run, plan)

    def start(self, scenario: Scenario, plan: Plan = ()) -> Run:
        if self.store.is_sqlite:
            self._restore(scenario)
        else:
            self._clear()
        run = Run(scenario, self.store, plan)
        if not self.store.is_sqlite:
            _subscribe(run.world, scenario)
        for statement in self.sabotage:
            with self.store.engine.begin() as connection:
                connection.execute(text(statement))
        return run

    def _restore(self, scenario: Scenario) -> None:
        key = scenario.card_token
        if key not in self._prepared:
            self._empty()
            _subscribe(World(self.store), scenario)
            with _raw(self.store) as connection:
                self._prepared[key] = _copied(connection)
        with _raw(self.store) as connection:
            self._prepared[key].backup(connection)

    def _empty(self) -> None:
        with _raw(self.store) as connection:
            if "empty" not in self._prepared:
                self._prepared["empty"] = _copied(connection)
            self._prepared["empty"].backup(connection)

    def _clear(self) -> None:
        with self.store.engine.begin() as connection:
            # Triggers and foreign keys off: the history refuses to be deleted otherwise.
            connection.execute(text("SET session_replication_role = replica"))
            for table in ("events", "attempts", "invoices", "subscriptions", "cards", "customers"):
                connection.execute(text(f"DELETE FROM {table}"))  # noqa: S608 - our own names
            connection.execute(text("UPDATE switches SET is_on = true"))
            connection.execute(text("SET session_replication_role = DEFAULT"))


def _subscribe(world: World, scenario: Scenario) -> None:
    world.subscribe(scenario.card_token, ends_after_periods=1)


@contextmanager
def _raw(store: Store) -> Iterator[sqlite3.Connection]:
    connection = store.engine.raw_connection()
    try:
        yield connection.driver_connection
    finally:
        connection.close()


def _copied(source: sqlite3.Connection) -> sqlite3.Connection:
    copy = sqlite3.connect(":memory:")
    source.backup(copy)
    return copy


@contextmanager
def sqlite_bench(path: Any) -> Iterator[Bench]:
    with Store(f"sqlite:///{path}") as store:
        migrate(store)
        name_book(store, prefix="")
        bench = Bench(store)
        yield bench
        for copy in bench._prepared.values():
            copy.close()


@contextmanager
def listening() -> Iterator[list[str]]:
    """Swallow the logs; keep what says that our own code broke."""
    heard: list[str] = []

    def hear(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        if event.get("kind") == "charge.crashed":
            error = sys.exc_info()[1]
            heard.append(f"a charge crashed: {error!r}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[hear])
    try:
        yield heard
    finally:
        structlog.configure(**before)
