"""The production services over ports that number every boundary, and a process that can die there.

A boundary is a place where the process meets the rest of the world: a transaction begins or
commits, a request leaves or is answered, a message is published or taken, the clock is read. Each
crossing has a number in the order of occurrence and a name. A fault strikes at one number. Then
the world is driven until nothing is due any more, and `verdicts.py` judges what it has become.

Nothing here is random: the same scenario and the same faults give the same run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from billing_worker.domain.errors import OutcomeUnknown
from billing_worker.domain.timings import Timings
from billing_worker.gateway.http import Request, Response
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import CommitUnknown, Store
from billing_worker.sandbox.gateway import Behaviour
from billing_worker.services.charging.charge import charge_batch
from billing_worker.services.charging.reconcile import poll_batch, reconcile_due
from billing_worker.services.doorbell import ring_due
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.ports import Ports
from tests.faults.killing_worker import use_case_of
from tests.support.backup import Backup, restore
from tests.support.world import World

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

QUICK_TERMS = Timings(
    reconcile_after=2 * MINUTE,
    stuck_after=MINUTE,
    expiry_grace=10 * MINUTE,
    not_charged_retry=2 * MINUTE,
    expired_retry=12 * MINUTE,
)
"""Short waits mean few looks until an invoice expires, and so a quick run."""

HORIZON = 33 * DAY
"""Past every recheck of the last attempt: nothing happens by itself after it."""

MOST_TICKS = 1_000


class ProcessDied(BaseException):
    """The process is gone in the middle of what it did."""


# --- crossings and faults --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Crossing:
    number: int
    name: str
    what: str  # begin, commit, send, receive, publish, take or clock
    side: str  # before or after
    in_transaction: bool
    world: tuple[int, datetime]  # equal for two crossings between which nothing outside happened

    def __str__(self) -> str:
        return f"{self.number} ({self.name})"


class Fault:
    """Something that goes wrong at one crossing."""

    name = "?"
    depends_on_the_world_alone = False
    """True: at two crossings with an equal `world` it leaves the same world behind."""

    def applies_to(self, crossing: Crossing) -> bool:
        raise NotImplementedError

    def strike(self, run: Run, crossing: Crossing) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.name


class Dies(Fault):
    """SIGKILL: what is not committed is lost, locks are released, memory is gone."""

    depends_on_the_world_alone = True

    def __init__(self, *, with_the_broker: bool = False) -> None:
        self.wipes = with_the_broker
        self.name = "dies with the broker" if with_the_broker else "dies"

    def applies_to(self, crossing: Crossing) -> bool:
        return True

    def strike(self, run: Run, crossing: Crossing) -> None:
        if self.wipes:
            run.world.bell.messages.clear()
        raise ProcessDied(crossing.name)


class Sleeps(Fault):
    """SIGSTOP, or a long pause: others carry on meanwhile, then it wakes up and goes on.

    Not inside a transaction: there the others would wait for its locks, and it could not do harm.
    """

    def __init__(self, span: timedelta) -> None:
        self.span = span
        self.name = f"sleeps {span}"

    def applies_to(self, crossing: Crossing) -> bool:
        if crossing.what == "clock":  # the other readings decide nothing that is not checked again
            return "monotonic" in crossing.name and not crossing.in_transaction
        return not crossing.in_transaction and crossing.what != "take"

    def strike(self, run: Run, crossing: Crossing) -> None:
        run.others_carry_on(self.span)


class Breaks(Fault):
    """The line breaks at this boundary and the process lives on, not knowing what happened.

    A commit raises, a request or its answer is lost, a message is lost or comes twice.
    """

    name = "breaks"

    def applies_to(self, crossing: Crossing) -> bool:
        if crossing.what == "begin":
            return crossing.side == "before"
        return crossing.what in {"commit", "send", "receive", "publish"}

    def strike(self, run: Run, crossing: Crossing) -> None:
        match crossing.what:
            case "begin":
                raise OperationalError("BEGIN", {}, Exception("the database is away"))
            case "commit":
                raise CommitUnknown("commit failed: the line broke")
            case "send" | "receive":
                raise OutcomeUnknown("the line broke")
            case _:
                raise _MessageBroke


class _MessageBroke(Exception):
    pass


class RefusesASale(Fault):
    """The gateway has charged and answers that it has not (gateway.md §0 E)."""

    name = "answers 422 to a sale it has charged"

    def applies_to(self, crossing: Crossing) -> bool:
        return crossing.what == "receive" and "/payment/sale" in crossing.name

    def strike(self, run: Run, crossing: Crossing) -> None:
        raise _Answered(
            Response(422, b'{"errors": [{"title": "refused"}]}', "application/vnd.api+json")
        )


class _Answered(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class Acts(Fault):
    """An operator does something at this moment, in SQL, from another process."""

    def __init__(self, name: str, *statements: str) -> None:
        self.name = name
        self._statements = statements

    def applies_to(self, crossing: Crossing) -> bool:
        return not crossing.in_transaction and crossing.what != "clock"

    def strike(self, run: Run, crossing: Crossing) -> None:
        with run.world.store.engine.begin() as connection:
            for statement in self._statements:
                connection.execute(text(statement))


Plan = Sequence[tuple[int, Fault]]
"""Faults in order. Numbers count from 1; after each fault the counting starts anew."""


# --- instrumented ports ----------------------------------------------------------------------


class _Store:
    def __init__(self, run: Run) -> None:
        self._run = run

    def transaction(self) -> Any:
        return self._transaction(use_case_of(sys._getframe(1)))

    def reading(self) -> Any:
        return self._reading(use_case_of(sys._getframe(1)))

    @contextmanager
    def _transaction(self, use_case: str) -> Iterator[Any]:
        run = self._run
        run.commits[use_case] += 1
        name = f"#{run.commits[use_case]} of {use_case}"
        run.cross("begin", "before", f"begin{name}")
        with run.world.store.transaction() as connection, run.inside_a_transaction():
            run.cross("begin", "after", f"begin{name}")
            yield connection
            run.cross("commit", "before", f"commit{name}")
        run.effects += 1
        run.cross("commit", "after", f"commit{name}")

    @contextmanager
    def _reading(self, use_case: str) -> Iterator[Any]:
        self._run.cross("begin", "before", f"reading of {use_case}")
        with self._run.world.store.reading() as connection:
            yield connection


class _Clock:
    def __init__(self, run: Run) -> None:
        self._run = run

    def now(self) -> datetime:
        self._run.cross("clock", "before", f"clock: now of {use_case_of(sys._getframe(1))}")
        return self._run.world.clock.now()

    def monotonic(self) -> float:
        self._run.cross("clock", "before", f"clock: monotonic of {use_case_of(sys._getframe(1))}")
        return self._run.world.clock.monotonic()


class _Transport:
    def __init__(self, run: Run) -> None:
        self._run = run

    def send(self, request: Request, *, moves_money: bool) -> Response:
        run = self._run
        name = f"{request.method} {_route(request.url)}"
        run.requests[name] += 1
        name = f"{name} #{run.requests[name]}"
        if run.transactions:
            run.seen.append(f"{name} was sent inside a transaction")
        if moves_money:
            run.about_to_sell(request)
        run.cross("send", "before", f"{name}: before effect")
        try:
            response = run.carry(request, moves_money=moves_money)
        finally:
            run.effects += 1
        try:
            run.cross("receive", "after", f"{name}: after effect")
        except _Answered as lie:
            return lie.response
        return response


def _route(url: str) -> str:
    path = url.partition("://")[2].partition("/")[2].partition("?")[0]
    parts = ["{id}" if part.startswith("cpi_") else part for part in path.split("/")]
    return "/" + "/".join(parts).strip("/")


class _Bell:
    def __init__(self, run: Run) -> None:
        self._run = run

    def charge(self, invoice_ids: Sequence[int]) -> None:
        self._ring("charge", invoice_ids)

    def poll(self, attempt_ids: Sequence[int]) -> None:
        self._ring("poll", attempt_ids)

    def _ring(self, kind: str, ids: Sequence[int]) -> None:
        run = self._run
        try:
            run.cross("publish", "before", f"publish {kind}: before")
        except _MessageBroke:
            return
        getattr(run.world.bell, kind)(ids)
        run.effects += 1
        try:
            run.cross("publish", "after", f"publish {kind}: after")
        except _MessageBroke:
            getattr(run.world.bell, kind)(ids)


# --- scenarios and runs ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scenario:
    """One subscription with one due period, one way for the gateway to be, one card's script."""

    name: str
    token: str
    behaviour: Behaviour
    fates: frozenset[str]
    """What may have become of the period at the end."""
    debits: frozenset[int]
    late_money: bool = False
    """Money may move after the gateway has called the invoice final."""
    timings: Timings = QUICK_TERMS
    horizon: timedelta = HORIZON

    @property
    def card_token(self) -> str:
        return f"{self.token}.never-write-this-down"


@dataclass(slots=True)
class Outcome:
    scenario: Scenario
    plan: Plan
    struck: list[str]
    crossings: list[Crossing]  # since the last fault
    violations: list[str]
    charged_twice: bool
    lost: bool
    digest: tuple[Any, ...]

    def __str__(self) -> str:
        said = [f"{self.scenario.name}: " + (", then ".join(self.struck) or "no fault")]
        return "\n    ".join(said + self.violations)


class Run:
    """One run of a scenario. Whoever owns the database has emptied it before."""

    def __init__(self, scenario: Scenario, store: Store, plan: Plan = ()) -> None:
        self.scenario = scenario
        self.world = World(store, scenario.behaviour, scenario.timings)
        self.carry: Callable[..., Response] = self.world.transport.send
        self.commits: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.effects = 0
        self.transactions = 0
        self.crossings: list[Crossing] = []
        self.struck: list[str] = []
        self.seen: list[str] = []
        """Violations that were seen while it ran."""
        self.kept: Backup = {}
        self._armed_at: dict[str, datetime] = {}
        self._plan = list(plan)
        self._number = 0
        self._ticks = 0
        self.ports = self._new_process()

    # --- boundaries ---

    def cross(self, what: str, side: str, name: str) -> None:
        self._number += 1
        if not name.endswith((side, "effect")):
            name = f"{name}: {side}"
        crossing = Crossing(
            self._number,
            name,
            what,
            side,
            self.transactions > 0,
            (self.effects, self.world.clock.now()),
        )
        self.crossings.append(crossing)
        if what == "commit" and side == "after":
            self._after_commit(name)
        if self._plan and self._plan[0][0] == self._number:
            _, fault = self._plan.pop(0)
            if fault.applies_to(crossing):
                self._strike(fault, crossing)

    def _strike(self, fault: Fault, crossing: Crossing) -> None:
        self.struck.append(f"{fault.name} at {crossing}")
        self._number = 0
        self.crossings = []
        fault.strike(self, crossing)

    @contextmanager
    def inside_a_transaction(self) -> Iterator[None]:
        self.transactions += 1
        try:
            yield
        finally:
            self.transactions -= 1

    # --- processes ---

    def _new_process(self) -> Ports:
        return self.world.ports_of_a_worker(
            self.scenario.timings,
            store=_Store(self),
            gateway=self.world.gateway(_Transport(self)),
            clock=_Clock(self),
            bell=_Bell(self),
        )

    def go_back(self) -> None:
        """The database is as it was when the backup was taken."""
        restore(self.world.store, self.kept)
        self._armed_at.clear()

    def others_carry_on(self, span: timedelta) -> None:
        """Another process runs the same world for this long, then the first one goes on."""
        sleeper, self.ports = self.ports, self._new_process()
        self.drive(self.world.clock.now() + span)
        self.ports = sleeper

    def drive(self, until: datetime) -> None:
        """Sweep at every instant at which something is due, up to `until` or until it is quiet."""
        clock = self.world.clock
        while True:
            try:
                self._tick()
            except ProcessDied:
                self.transactions = 0
                self.ports = self._new_process()
                continue
            due = self._next_instant()
            if due is None or due > until:
                break
            clock.advance(max(due - clock.now(), timedelta(seconds=1)))
        clock.advance(max(until - clock.now(), timedelta()))

    def _tick(self) -> None:
        self._ticks += 1
        if self._ticks > MOST_TICKS:
            raise RuntimeError("the world never comes to rest")
        for sweep in (renew_due, ring_due, reconcile_due):
            self._task(sweep)
        messages = self.world.bell.messages
        while messages:
            kind, ids = messages.pop(0)
            self.effects += 1
            self.cross("take", "after", f"take a message to {kind}")
            self._task(charge_batch if kind == "charge" else poll_batch, ids)

    def _task(self, work: Callable[..., Any], *args: Any) -> None:
        """As Celery does: an exception ends the task and nothing else."""
        try:
            work(self.ports, *args)
        except (SQLAlchemyError, CommitUnknown):
            pass
        except Exception as error:
            self.seen.append(f"{work.__name__} ended with {error!r}")

    def _next_instant(self) -> datetime | None:
        questions = (
            select(func.min(tables.invoices.c.enqueue_at)),
            select(func.min(tables.attempts.c.next_poll_at)),
            select(func.min(tables.subscriptions.c.next_billing_at)),
        )
        with self.world.store.reading() as connection:
            answers = [connection.execute(question).scalar() for question in questions]
        return min((answer for answer in answers if answer is not None), default=None)

    # --- what must hold at every moment ---

    def about_to_sell(self, request: Request) -> None:
        """Judge a sale at the moment at which it leaves."""
        bearer = request.headers["Authorization"].removeprefix("Bearer ")
        invoice = self.world.sandbox._books.with_bearer(bearer)
        if invoice is None:
            self.seen.append("a sale left with a bearer that the gateway does not know")
            return
        reference = invoice.order.reference_id
        attempts = tables.attempts.c
        with self.world.store.reading() as connection:
            row = connection.execute(
                select(attempts.status, attempts.gateway_id)
                .where(attempts.reference_id == reference)
            ).one_or_none()  # fmt: skip
        if row is None or row.status != "submitted" or row.gateway_id != invoice.gateway_id:
            self.seen.append(f"sale of {reference} left before `submitted` was committed")
            return
        armed_at = self._armed_at.get(reference, self.world.clock.now())
        age = (self.world.clock.now() - armed_at).total_seconds()
        if age > Timings().sale_gate_seconds:
            self.seen.append(f"sale of {reference} left {age:.0f} s after its commit")

    def _after_commit(self, name: str) -> None:
        if " of submit:" not in name:
            return
        attempts, invoices = tables.attempts.c, tables.invoices.c
        with self.world.store.reading() as connection:
            submitted = connection.execute(
                select(attempts.reference_id, invoices.status, tables.subscriptions.c.status)
                .join(tables.invoices, invoices.id == attempts.invoice_id)
                .join(
                    tables.subscriptions, tables.subscriptions.c.id == invoices.subscription_id
                )
                .where(attempts.status == "submitted")
            ).all()  # fmt: skip
            sales_on = connection.execute(select(tables.switches.c.is_on)).scalar()
        for reference, invoice, subscription in submitted:
            if reference in self._armed_at:
                continue
            self._armed_at[reference] = self.world.clock.now()
            if invoice != "open":
                self.seen.append(f"{reference} was armed although its invoice is {invoice}")
            if subscription not in {"trialing", "active", "past_due", "ended"}:
                self.seen.append(f"{reference} was armed although {subscription}")
            if not sales_on:
                self.seen.append(f"{reference} was armed although sales are switched off")
