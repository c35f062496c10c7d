"""A billing world driven by a seed: what happens next, and what goes wrong, is drawn by chance.

The production services run over ports that may stop at every boundary: before a transaction,
after its commit, before a request takes effect, after its effect. Each running task is a greenlet;
the scheduler decides which one goes on, which one dies, which message is lost, doubled or late, and
how far the clock moves. The same seed gives the same events, hash for hash.

Transactions themselves are not interleaved: both databases serialise what conflicts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, ClassVar, NoReturn

import structlog
from greenlet import greenlet
from sqlalchemy import bindparam, func, select

from billing_worker.domain.attempt import Origin
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import KEEPS_CRASHING
from billing_worker.gateway.http import Request, Response
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import CommitUnknown
from billing_worker.persistence.switches import turn_sales
from billing_worker.sandbox.gateway import Behaviour
from billing_worker.services import dunning
from billing_worker.services.charging.charge import charge_batch
from billing_worker.services.charging.reconcile import poll_batch, reconcile_due
from billing_worker.services.doorbell import ring_due
from billing_worker.services.invoicing.renew import renew_due
from tests.simulation.memory import MemoryStore
from tests.simulation.moments import (
    Died,
    one_charge_keeps_crashing,
    somebody_sleeps_before_a_sale,
)
from tests.simulation.people import (
    ANSWERS,
    Decision,
    People,
    customer_pays,
    forgive_whom_it_may_concern,
)
from tests.simulation.rare import IN_EVERY_LIFE, reached
from tests.simulation.searches import Searches
from tests.simulation.witness import Waits, Witness, period_of
from tests.support.contradictions import contradictions
from tests.support.world import TwinTransport, World

TOKENS = (
    "approved", "approved", "approved", "approved_later", "decline_insufficient_funds",
    "decline_card_expired", "answer_lost_after", "answer_lost_before", "never_answers_after",
    "never_answers_before", "error_500_after", "error_500_before", "html_502_after",
    "create_answer_lost", "create_error_500", "flips_to_processed", "late_after_expiry",
    "late_6h_after_expiry", "late_16h_after_expiry", "late_80h_after_expiry",
    "flips_after_5m", "flips_after_2h", "expires_insufficient_funds", "expires_card_is_stolen",
    "pending_forever", "needs_3ds", "wrong_amount", "partially_processed", "rejects_token",
)  # fmt: skip

LATE_TOKENS = {token for token in TOKENS if token.startswith(("flips_", "late_"))}
"""Here the gateway itself calls a charge final and takes the money later."""

HORIZON = timedelta(days=70)
HOUR = 3_600
DAY = 24 * HOUR
LATER = (2, 60, 4000, 6 * HOUR, 16 * HOUR, 80 * HOUR)
"""Seconds until money comes that comes late: after the sale, or after the invoice has expired."""

REST = (1,) * 2 + (60,) * 2 + (1200,) * 3 + (7200,) * 4 + (DAY,) * 100
"""Least seconds between the last sweeps. What is pending for ever is asked about for ever: the
first sweep after a day that changes nothing, with no date ahead, is the last."""

LAST_OPENING = 40
"""Of those sweeps, the last that opens periods: what is open then has time to come to its end."""

_NEXT_DUE = select(
    select(func.min(tables.invoices.c.enqueue_at)).scalar_subquery(),
    select(func.min(tables.attempts.c.next_poll_at)).scalar_subquery(),
)
_KEPT_CRASHING = (
    select(tables.invoices.c.reference_id)
    .join(tables.subscriptions)
    .where(tables.subscriptions.c.status != "paused", tables.invoices.c.status == "open")
    .where(tables.invoices.c.reason.startswith(KEEPS_CRASHING))
    .where(
        ~select(tables.attempts.c.id)
        .where(tables.attempts.c.invoice_id == tables.invoices.c.id)
        .where(tables.attempts.c.status.in_(("prepared", "submitted")))
        .exists()
    )
)
_DATES = select(
    select(func.count())
    .where(tables.invoices.c.next_attempt_at > bindparam("now"))
    .scalar_subquery(),
    select(func.count())
    .where(tables.attempts.c.settled_at.is_not(None), tables.attempts.c.next_poll_at.is_not(None))
    .where(tables.attempts.c.undecided_since.is_(None))
    .scalar_subquery(),
)
_ASKED_FOR = select(tables.attempts.c.reference_id).where(
    tables.attempts.c.origin.in_((Origin.MANUAL, Origin.NEW_CARD, Origin.LINK))
)
_SURPLUS_TOLD = (
    select(tables.attempts.c.reference_id)
    .join(tables.events, tables.events.c.attempt_id == tables.attempts.c.id)
    .where(tables.attempts.c.status == "surplus")
    .where(tables.events.c.kind == EventKind.ATTEMPT_SURPLUS, tables.events.c.alert)
)
_STATES = tuple(
    select(table.c.id, table.c.status, column).order_by(table.c.id)
    for table, column in (
        (tables.invoices, tables.invoices.c.next_attempt_at),
        (tables.attempts, tables.attempts.c.settled_at),
    )
)

A_SLEEP, ONE_DEAD_CARD = 0.002, 0.1
"""Chances, per step and per customer of all, of what few seeds would come to by themselves."""

STEPS_BETWEEN_QUESTIONS = 30
"""In between, whatever is half done must not look broken to whoever watches the books."""

FORGIVES = 0.2
"""Chance that somebody forgives whoever is suspended at the end: before, hardly anybody is."""

LONGEST_TASK = 400
"""Boundaries one task may cross: a loop that crosses more is a finding."""


class Violation(AssertionError):
    """An invariant does not hold; the trace says how it came to that."""


@dataclass(slots=True)
class Task:
    name: str
    run: greenlet
    at: str = "start"
    crossed: int = 0
    at_once: bool = False  # nobody comes between its steps


class FaultyTransport(TwinTransport):
    """The twin with a boundary on either side of the effect."""

    boundary: Callable[[str], None]

    def send(self, request: Request, *, moves_money: bool) -> Response:
        what = "sale" if moves_money else request.method
        self.boundary(f"{what} leaves")
        answer = super().send(request, moves_money=moves_money)
        self.boundary(f"{what} answered")
        return answer


@dataclass
class Simulation:
    seed: int
    template: bytes
    steps: int = 120
    subscriptions: int = 2
    people_act: int = 7
    customers: str = ""  # how the names of this book's customers begin
    answers_are_heard: bool = False  # nobody dies in the middle of a decision
    trace: list[str] = field(default_factory=list)

    must_reach: ClassVar[frozenset[str]] = IN_EVERY_LIFE | {
        "commit that raised was kept",
        "commit that raised was lost",
        "customer pays on a page: 200",
        "customer pays on a page: 409",
    }

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.rarely = random.Random(~self.seed)
        """For what makes a rare state less rare: most seeds stay as they are."""
        self.calm = False
        self.tasks: list[Task] = []
        self.tokens: dict[str, str] = {}
        self.hub = greenlet.getcurrent()
        self.store = self._new_store()
        behaviour = Behaviour(
            duplicate_create=self.rng.choice(
                ["accept_new", "return_existing", "409", "422", "429"]
            ),
            second_sale="charge",
            later_seconds=self.rng.choice(LATER),
            lifetime_seconds=self.rng.choice([600, 3600]),
        )
        self.world = self._within(World(self.store, behaviour))
        self.ports = self.world.ports
        self.witness = Witness(self.world.sandbox)
        self.happened: Counter[str] = Counter()
        self.excused: dict[str, str] = {}
        """Second debits that no client could know of, and why."""
        self.checked: dict[World, tuple[int, int]] = {}
        self.start = self.world.clock.now()
        self.searches = Searches(self.start)
        references = [f"sub-{number}" for number in range(self.subscriptions)]
        self.people = People(self.rng, references, self.rarely)

    def _new_store(self, number: int = 0) -> MemoryStore:
        return MemoryStore(self.template, self._boundary, self._fate_of_commit, number)

    def _within(self, world: World) -> World:
        """The same world, with a boundary on either side of each request's effect."""
        transport = FaultyTransport(world.sandbox, world.clock)
        transport.boundary = self._boundary
        world.transport = transport
        world.ports = world.ports_of_a_worker(gateway=world.gateway(transport))
        return world

    # --- one run ------------------------------------------------------------------------------

    def run(self) -> str:
        """Returns the hash of everything that happened. Raises Violation."""
        try:
            self._subscribe()
            for number in range(self.steps):
                self._step()
                if number % STEPS_BETWEEN_QUESTIONS == 0:
                    self._check_books()
            self._come_to_rest()
            return self._fingerprint()
        finally:
            self._drop_tasks()
            self.store.close()

    def _subscribe(self) -> None:
        """Sometimes one customer has them all, with one card."""
        has_all = {"reference_id": f"{self.customers}customer-of-all"}
        customer = has_all if self.rng.random() < 0.25 else None
        on_one_card = self.rng.choice(TOKENS)
        is_dead = customer is not None and self.rarely.random() < ONE_DEAD_CARD
        on_one_card = "decline_card_expired" if is_dead else on_one_card
        self.calm = True
        for number in range(self.subscriptions):
            reference = f"sub-{number}"
            token = self.tokens[reference] = on_one_card if customer else self.rng.choice(TOKENS)
            self._say(f"subscribe {reference} with {token}")
            own = {"reference_id": f"{self.customers}customer-of-{reference}"}
            self.world.subscribe(token, reference, customer=customer or own)
        if is_dead:
            self._say("all are claimed before the first is declined")
            self.world.tick()
        self.calm = False

    def _step(self) -> None:
        if self.rarely.random() < A_SLEEP:
            somebody_sleeps_before_a_sale(self)
            self._check_money()
            return
        actions: Sequence[tuple[float, Callable[[], None]]] = (
            (40 if self.tasks else 0, self._go_on),
            (6 if self.tasks else 0, self._die),
            (20 if self.world.bell.messages else 0, self._deliver),
            (4 if self.world.bell.messages else 0, self._lose_message),
            (1, self._wipe_broker),
            (9, lambda: self._begin("renew", renew_due)),
            (9, lambda: self._begin("ring", ring_due)),
            (9, lambda: self._begin("poll", reconcile_due)),
            (14, self._let_time_pass),
            (2, self._toggle_gateway),
            (3, self._storm_of_callbacks),
            (self.people_act, self._somebody_acts),
            (12 if self.people.pages else 0, self._customer_pays),
            (0.15, lambda: one_charge_keeps_crashing(self)),
        )
        weights = [weight for weight, _ in actions]
        self.rng.choices([action for _, action in actions], weights)[0]()
        self._check_money()

    def _come_to_rest(self) -> None:
        """The faults stop; sweeps alone must bring every period to one of its fates."""
        self.calm = True
        self._drop_tasks()
        self.world.transport.unreachable = False
        with self.store.transaction() as connection:
            turn_sales(connection, on=True, by="calm", reason=None, now=self.world.clock.now())
        self._say("calm")
        self._retry_what_kept_crashing()
        somebody_forgives = self.rarely.random() < FORGIVES
        states = self._states()
        for number, least_seconds in enumerate(REST):
            before = states
            if somebody_forgives and (forgiven := forgive_whom_it_may_concern(self.ports)):
                self._say(f"somebody forgives {forgiven}")
            self.world.sweep(opens=number <= LAST_OPENING)
            self.world.deliver()
            self._check_money()
            search = self.searches.next(self.store)
            due = self._next_due() or search
            states = self._states()
            quiet = least_seconds == DAY and states == before and not self._has_dates()
            if due is None or (quiet and search is None):
                break
            wait = max(due - self.world.clock.now(), timedelta(seconds=least_seconds))
            self.world.clock.advance(wait)
        else:
            self.world.sweep(opens=False)
            self.world.deliver()
        if problems := self._problems():
            self._violated(f"{problems}")

    def _retry_what_kept_crashing(self) -> None:
        """It waits for a person, whom nothing may stand in the way of but a card that has died since."""
        with self.store.reading() as connection:
            held = list(connection.execute(_KEPT_CRASHING).scalars())
        for reference in held:
            self._say(f"somebody retries {reference}")
            try:
                dunning.retry_invoice(
                    self.store, self.world.clock, reference=reference, by="calm", why="mended"
                )
            except InvalidInput as error:
                if not error.reason.startswith("card.usable"):
                    raise
                self._say(f"told: {error}")

    def _problems(self) -> list[str]:
        return self.world.discrepancies() + self._stuck() + self._untold() + self._broken()

    # --- what may happen ----------------------------------------------------------------------

    def _begin(self, name: str, work: Callable[[Any], Any], *, at_once: bool = False) -> None:
        if len(self.tasks) >= 6:
            return
        run = greenlet(lambda: self._run(work), parent=self.hub)
        task = Task(name, run, at_once=at_once)
        self.tasks.append(task)
        self._switch(task)

    def _run(self, work: Callable[[Any], Any]) -> None:
        try:
            work(self.ports)
        except CommitUnknown as error:
            self._say(f"task ended: {error}")  # as entrypoints/worker/tasks.py ends it
        except ANSWERS as answer:
            self._say(f"told: {answer}")

    def _deliver(self) -> None:
        queue = self.world.bell.messages
        index = self.rng.randrange(len(queue))
        kind, ids = queue[index] if self.rng.random() < 0.25 else queue.pop(index)
        work = charge_batch if kind == "charge" else poll_batch
        self._begin(f"{kind} {list(ids)}", lambda ports: work(ports, ids))

    def _go_on(self) -> None:
        self._switch(self.rng.choice(self.tasks))

    def _die(self) -> None:
        task = self.rng.choice(self.tasks)
        self._say(f"{task.name} dies at {task.at}")
        self.tasks.remove(task)
        task.run.throw(Died)

    def _lose_message(self) -> None:
        queue = self.world.bell.messages
        self._say(f"lost {queue.pop(self.rng.randrange(len(queue)))}")

    def _wipe_broker(self) -> None:
        self._say("broker wiped")
        self.world.bell.messages.clear()

    def _let_time_pass(self) -> None:
        seconds = self.rng.choice([1, 4, 7, 31, 301, 1000, 3700, 3700, 90_000, 700_000])
        if self.world.clock.now() + timedelta(seconds=seconds) > self.start + HORIZON:
            return
        self.world.clock.advance(seconds)
        self._say(f"{seconds} s pass")

    def _toggle_gateway(self) -> None:
        transport = self.world.transport
        transport.unreachable = not transport.unreachable
        self._say("gateway unreachable" if transport.unreachable else "gateway back")

    def _storm_of_callbacks(self) -> None:
        with self.store.reading() as connection:
            ids = list(connection.execute(select(tables.attempts.c.id)).scalars())
        for _ in range(self.rng.randrange(8) if ids else 0):
            self.world.bell.poll([self.rng.choice(ids)])

    def _somebody_acts(self) -> None:
        name, act = self.people.next_act()
        at_once = self.rng.random() < 0.6
        if isinstance(act, Decision):
            at_once = at_once or self.answers_are_heard
            self._begin(name, lambda ports: self._decide(ports, name, act), at_once=at_once)
        else:
            self._begin(name, act, at_once=at_once)

    def _decide(self, ports: Any, name: str, decision: Decision) -> None:
        """Whoever decides asks until there is an answer."""
        for _ in range(20):
            at = self.world.clock.now()
            with suppress(CommitUnknown):
                answer = decision.say(ports, None)
                self._say(f"{name}: {getattr(answer, 'outcome', 'done')}")
                self._decided(getattr(answer, "decided_at", at), decision)
                return

    def _decided(self, at: datetime, decision: Decision) -> None:
        """Somebody has heard an answer, and may have to say it again."""

    def _customer_pays(self) -> None:
        page = self.people.page_to_pay()
        if page is not None:
            self.happened["customer pays on a page left open"] += bool(page.get("left_open"))
            self._say(customer_pays(self.ports, page, self._pay))

    def _pay(self, gateway_id: str) -> Any:
        self.witness.asked_by_id(gateway_id, self.world.clock.now())
        answer = self.world.sandbox.pay_on_page(gateway_id)
        self.happened[f"customer pays on a page: {answer.status}"] += 1
        return answer

    # --- the machinery ------------------------------------------------------------------------

    def _switch(self, task: Task) -> None:
        self._say(f"{task.name} goes on from {task.at}")
        task.run.switch()
        if task.run.dead:
            self.tasks.remove(task)

    def _boundary(self, name: str) -> None:
        """Where a task may be stopped, overtaken, or killed."""
        if self.calm:
            return
        current = greenlet.getcurrent()
        task = next((task for task in self.tasks if task.run is current), None)
        if task is None or task.at_once:
            return
        task.at = name
        task.crossed += 1
        if task.crossed > LONGEST_TASK:
            self._violated(f"{task.name} never ends")
        self.hub.switch()

    def _fate_of_commit(self) -> str:
        if self.calm or self.rng.random() > 0.02:
            return ""
        fate = self.rng.choice(["kept", "lost"])
        self.happened[f"commit that raised was {fate}"] += 1
        return fate

    def _drop_tasks(self) -> None:
        for task in self.tasks:
            task.run.throw(Died)
        self.tasks.clear()

    def _say(self, line: str) -> None:
        at = self.world.clock.now() - self.start if hasattr(self, "start") else timedelta()
        self.trace.append(f"{at}  {line}")

    def reached(self) -> Counter[str]:
        """How often this run came to each rare state, or made one."""
        return reached(self.store) + self.happened

    def story(self) -> str:
        return "\n".join(self.trace)

    # --- what must hold -----------------------------------------------------------------------

    def _check_money(self) -> None:
        """Looks again only after a request or a debit: a run has few of them and many steps."""
        moves = len(self.world.transport.sent), len(self.world.sandbox.ledger)
        if self.checked.get(self.world) == moves:
            return
        self.checked[self.world] = moves
        self._check_sales()
        twice = {period for period, count in self.world.debits().items() if count > 1}
        if twice - self.excused.keys():
            self._excuse(twice)

    def _broken(self) -> list[str]:
        return contradictions(self.store, self.world.clock.now(), at_rest=True)

    def _check_books(self) -> None:
        if broken := contradictions(self.store, self.world.clock.now(), at_rest=False):
            self._violated(f"{broken}")

    def _check_sales(self) -> None:
        requests = self.world.sandbox.requests.as_json()["references"]
        for reference, counts in requests.items():
            if counts["sale"] > 1:
                self._violated(f"{reference} sold {counts['sale']} times")

    def _excuse(self, twice: set[str]) -> None:
        self._note_what_people_asked_for()
        terms = self.ports.timings
        waits = Waits(expired=terms.expired_retry, declined=terms.decline_stands)
        for period, told, reason in self.witness.second_debits(self.world.book.identity, waits):
            if reason is None:
                self._violated(f"{period} charged twice: {told}")
            elif period not in self.excused:
                self._say(f"{told}: {reason}")
                self.excused[period] = reason
        if unseen := twice - self.excused.keys():
            self._violated(f"{sorted(unseen)} charged twice")

    def _note_what_people_asked_for(self) -> None:
        with self.store.reading() as connection:
            asked_for = frozenset(connection.execute(_ASKED_FOR).scalars())
        self.witness.people_asked_for(asked_for)

    def _before_memory_is_lost(self) -> None:
        self._note_what_people_asked_for()
        self.people.leave_pages_open()

    def _violated(self, what: str) -> NoReturn:
        raise Violation(f"seed {self.seed}: {what}\n{self.story()}")

    def _next_due(self) -> datetime | None:
        """When a sweep next finds something, the opening of new periods aside."""
        with self.store.reading() as connection:
            found = connection.execute(_NEXT_DUE).one()
        return min((moment for moment in found if moment is not None), default=None)

    def _has_dates(self) -> bool:
        """Attempts of the ladder, and the last questions about those that have ended."""
        with self.store.reading() as connection:
            found = connection.execute(_DATES, {"now": self.world.clock.now()}).one()
        return any(found)

    def _states(self) -> list[Any]:
        with self.store.reading() as connection:
            return [connection.execute(query).all() for query in _STATES]

    def _untold(self) -> list[str]:
        """Every second debit needs its surplus, and its alert."""
        with self.store.reading() as connection:
            told = connection.execute(_SURPLUS_TOLD).scalars()
            surplus = Counter(period_of(reference) for reference in told)
        return [
            f"{period} was charged {count} times and has {surplus[period]} surplus alerts"
            for period, count in self.world.debits().items()
            if count - 1 > surplus[period]
        ]

    def _stuck(self) -> list[str]:
        """At rest nobody is waited for either, so this asks for more than `prepared_goes_on`."""
        query = (
            select(tables.attempts.c.reference_id)
            .join(tables.invoices)
            .where(tables.attempts.c.status == "prepared", tables.invoices.c.enqueue_at.is_(None))
        )
        with self.store.reading() as connection:
            return [
                f"{reference} is prepared and nobody will come back to it"
                for reference in connection.execute(query).scalars()
            ]

    def _fingerprint(self) -> str:
        with self.store.reading() as connection:
            rows = connection.execute(select(tables.events).order_by(tables.events.c.id)).all()
        told = [
            [row.at.isoformat(), row.kind, row.by, row.invoice_id, row.attempt_id, row.data]
            for row in rows
        ]
        canonical = json.dumps([self.trace, told], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def silence_logs() -> None:
    """Thousands of expected alerts would cost more than the runs themselves."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def shortest_failing_run(seed: int, template: bytes, steps: int) -> Violation | None:
    """The same seed with as few steps as still break it; None if it holds."""
    failure: Violation | None = None
    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        try:
            Simulation(seed, template, middle).run()
            low = middle + 1
        except Violation as violation:
            failure, high = violation, middle
    return failure
