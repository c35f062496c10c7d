"""The charge protocol as a small explicit model, searched exhaustively.

One subscription, two periods, two workers, any number of beats, a broker that loses and repeats
messages, a gateway that charges once per sale it receives, and processes that die anywhere. Time is
not modelled: whatever may happen after a while (a lease runs out, an invoice expires, a grace is
over) may happen at once, which is every clock there could be.

`Rules` switches single safeguards off: the search must then find a double charge, or it proves
nothing. Run `python -m tests.model` for the table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

PREPARED, SUBMITTED, SUCCEEDED, DECLINED, NOT_CHARGED, SURPLUS = (
    "prepared", "submitted", "succeeded", "declined", "not_charged", "surplus",
)  # fmt: skip
LIVE = {PREPARED, SUBMITTED}


@dataclass(frozen=True, slots=True)
class Rules:
    """True everywhere is the protocol as it is built."""

    submitted_is_committed_before_the_sale: bool = True
    fence_is_compared_when_arming: bool = True
    only_a_prepared_attempt_is_armed: bool = True
    fence_is_compared_when_giving_up: bool = True
    a_sale_is_sent_once: bool = True
    unknown_stays_unknown: bool = True
    one_live_attempt: bool = True
    nobody_resets_a_submitted_attempt: bool = True
    gateway_refuses_a_sale_of_a_final_invoice: bool = True  # the assumption, not our doing


@dataclass(frozen=True, slots=True)
class Bounds:
    periods: int = 2
    workers: int = 2
    attempts: int = 2
    claims: int = 3
    crashes: int = 2


class Attempt(NamedTuple):
    status: str
    fence: int
    gateway: str  # none, fresh, charged, declined, expired
    debits: int


class Period(NamedTuple):
    invoice: str  # none, open, paid
    attempts: tuple[Attempt, ...]
    message: bool  # a ring is on its way


class Frame(NamedTuple):
    """What a worker is in the middle of."""

    period: int
    attempt: int
    fence: int
    at: str  # claimed, created, armed


class State(NamedTuple):
    periods: tuple[Period, ...]
    workers: tuple[Frame | None, ...]
    crashes: int


class Step(NamedTuple):
    name: str
    is_fault: bool
    after: State


def initial(bounds: Bounds) -> State:
    nothing = Period("none", (), message=False)
    return State((nothing,) * bounds.periods, (None,) * bounds.workers, bounds.crashes)


def steps(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Everything that may happen next."""
    for number, period in enumerate(state.periods):
        yield from _time_and_sweeps(state, number, period, rules)
    for worker, frame in enumerate(state.workers):
        if frame is None:
            yield from _deliveries(state, worker, rules, bounds)
        else:
            yield from _frame(state, worker, frame, rules)


# --- sweeps, the gateway's own clock, and looking ----------------------------------------------


def _time_and_sweeps(state: State, number: int, period: Period, rules: Rules) -> Iterator[Step]:
    if period.invoice == "none":
        if number == 0 or state.periods[number - 1].invoice != "none":
            opened = period._replace(invoice="open", message=True)
            yield Step(f"open {number}", False, _with(state, number, opened))
        return
    if period.message:
        yield Step(f"lose {number}", True, _with(state, number, period._replace(message=False)))
    elif period.invoice == "open" and not any(a.status == SUBMITTED for a in period.attempts):
        yield Step(f"ring {number}", False, _with(state, number, period._replace(message=True)))
    for index, attempt in enumerate(period.attempts):
        if attempt.gateway == "fresh":
            yield Step(f"expire {number}.{index}", False,
                       _put(state, number, index, attempt._replace(gateway="expired")))  # fmt: skip
        yield from _polls(state, number, index, attempt, rules)


def _polls(state: State, number: int, index: int, attempt: Attempt, rules: Rules) -> Iterator[Step]:
    name = f"look {number}.{index}"
    period = state.periods[number]
    if attempt.gateway == "charged" and attempt.status in {SUBMITTED, DECLINED, NOT_CHARGED}:
        paid = period.invoice == "open"
        moved = _put(state, number, index, attempt._replace(status=SUCCEEDED if paid else SURPLUS))
        after = moved.periods[number]._replace(invoice="paid")
        yield Step(name, False, _with(moved, number, after))
    if attempt.status == SUBMITTED:
        ended = {"declined": DECLINED, "expired": NOT_CHARGED}.get(attempt.gateway)
        if ended:
            yield Step(name, False, _put(state, number, index, attempt._replace(status=ended)))
        if not rules.unknown_stays_unknown:
            failed = attempt._replace(status=NOT_CHARGED)
            yield Step(f"time out {number}.{index}", False, _put(state, number, index, failed))
        if not rules.nobody_resets_a_submitted_attempt:
            reset = attempt._replace(status=PREPARED)
            yield Step(f"reset {number}.{index}", False, _put(state, number, index, reset))


# --- workers -----------------------------------------------------------------------------------


def _deliveries(state: State, worker: int, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    for number, period in enumerate(state.periods):
        if not period.message:
            continue
        claimed = _claim(state, worker, number, rules, bounds)
        for kept in (False, True):  # a repeated message is one that stays in the queue
            after = claimed.periods[number]._replace(message=kept)
            name = f"deliver {number} to {worker}" + (", again" if kept else "")
            yield Step(name, kept, _with(claimed, number, after))


def _claim(state: State, worker: int, number: int, rules: Rules, bounds: Bounds) -> State:
    period = state.periods[number]
    if period.invoice != "open":
        return state
    live = [i for i, attempt in enumerate(period.attempts) if attempt.status in LIVE]
    if live and rules.one_live_attempt:
        index = live[-1]
        attempt = period.attempts[index]
        if attempt.status != PREPARED or attempt.fence >= bounds.claims:
            return state
        claimed = attempt._replace(fence=attempt.fence + 1)
        frame = Frame(number, index, claimed.fence, "claimed")
        return _at(_put(state, number, index, claimed), worker, frame)
    if len(period.attempts) >= bounds.attempts:
        return state
    added = period._replace(attempts=(*period.attempts, Attempt(PREPARED, 1, "none", 0)))
    frame = Frame(number, len(period.attempts), 1, "claimed")
    return _at(_with(state, number, added), worker, frame)


def _frame(state: State, worker: int, frame: Frame, rules: Rules) -> Iterator[Step]:
    if state.crashes:
        died = _at(state, worker, None)._replace(crashes=state.crashes - 1)
        yield Step(f"worker {worker} dies", True, died)
    attempt = state.periods[frame.period].attempts[frame.attempt]
    if frame.at == "claimed":
        yield from _create(state, worker, frame, attempt, rules)
    elif frame.at == "created":
        yield from _arm(state, worker, frame, attempt, rules)
    else:
        yield from _sell(state, worker, frame, attempt, rules)


def _create(
    state: State, worker: int, frame: Frame, attempt: Attempt, rules: Rules
) -> Iterator[Step]:
    """Created, found by our reference when an earlier claim has created it, or refused as a twin."""
    name = f"worker {worker} creates"
    ours = attempt.fence == frame.fence or not rules.fence_is_compared_when_giving_up
    if attempt.gateway != "none" and attempt.status in LIVE and ours:
        given_up = attempt._replace(status=NOT_CHARGED)
        ended = _put(state, frame.period, frame.attempt, given_up)
        yield Step(f"worker {worker} is refused and gives up", False, _at(ended, worker, None))
    made = attempt._replace(gateway="fresh") if attempt.gateway == "none" else attempt
    at_gateway = _put(state, frame.period, frame.attempt, made)
    if made.gateway == "fresh":
        yield Step(name, False, _at(at_gateway, worker, frame._replace(at="created")))
    elif attempt.status == PREPARED and attempt.fence == frame.fence:
        ended = _put(state, frame.period, frame.attempt, attempt._replace(status=NOT_CHARGED))
        yield Step(f"worker {worker} finds it ended", False, _at(ended, worker, None))
    else:
        yield Step(f"worker {worker} leaves", False, _at(state, worker, None))
    yield Step(f"{name}, the answer is lost", True, _at(at_gateway, worker, None))


def _arm(state: State, worker: int, frame: Frame, attempt: Attempt, rules: Rules) -> Iterator[Step]:
    ours = attempt.fence == frame.fence or not rules.fence_is_compared_when_arming
    prepared = attempt.status == PREPARED or not rules.only_a_prepared_attempt_is_armed
    wanted = state.periods[frame.period].invoice == "open"
    if not (ours and prepared and wanted):
        yield Step(f"worker {worker} may not arm", False, _at(state, worker, None))
        return
    if not rules.submitted_is_committed_before_the_sale:
        yield Step(f"worker {worker} goes on", False,
                   _at(state, worker, frame._replace(at="armed")))  # fmt: skip
        return
    submitted = _put(state, frame.period, frame.attempt, attempt._replace(status=SUBMITTED))
    yield Step(f"worker {worker} arms", False, _at(submitted, worker, frame._replace(at="armed")))
    yield Step(f"worker {worker} arms, COMMIT raised", True, _at(submitted, worker, None))


def _sell(
    state: State, worker: int, frame: Frame, attempt: Attempt, rules: Rules
) -> Iterator[Step]:
    sold = {"fresh": ("charged", 1), "charged": ("charged", 1), "declined": ("declined", 0),
            "expired": ("expired", 0)}  # fmt: skip
    if not rules.gateway_refuses_a_sale_of_a_final_invoice:
        sold["expired"] = ("charged", 1)
    gateway, debit = sold[attempt.gateway]
    outcomes = [("sells", gateway, debit)]
    if attempt.gateway == "fresh":
        outcomes += [("sells, declined", "declined", 0), ("sells, lost on the way", "fresh", 0)]
    for name, gateway_after, debits in outcomes:
        after = attempt._replace(gateway=gateway_after, debits=attempt.debits + debits)
        if not rules.submitted_is_committed_before_the_sale and after.status == PREPARED:
            committed = after._replace(status=SUBMITTED)
            lost = _put(state, frame.period, frame.attempt, after)
            yield Step(f"worker {worker} {name}, dies before it is written", True,
                       _at(lost, worker, None))  # fmt: skip
            after = committed
        done = _put(state, frame.period, frame.attempt, after)
        yield Step(f"worker {worker} {name}", False, _at(done, worker, None))
        if not rules.a_sale_is_sent_once:
            yield Step(f"worker {worker} {name}, and tries again", False, done)
    if attempt.status == SUBMITTED:
        unsent = _put(state, frame.period, frame.attempt, attempt._replace(status=NOT_CHARGED))
        yield Step(f"worker {worker} was too late to sell", False, _at(unsent, worker, None))


def _with(state: State, number: int, period: Period) -> State:
    periods = (*state.periods[:number], period, *state.periods[number + 1 :])
    return state._replace(periods=periods)


def _put(state: State, number: int, index: int, attempt: Attempt) -> State:
    period = state.periods[number]
    attempts = (*period.attempts[:index], attempt, *period.attempts[index + 1 :])
    return _with(state, number, period._replace(attempts=attempts))


def _at(state: State, worker: int, frame: Frame | None) -> State:
    workers = list(state.workers)
    workers[worker] = frame
    # Workers are alike: sorting them halves the states and loses none.
    return state._replace(workers=tuple(sorted(workers, key=lambda f: f or ())))


# --- what must hold ----------------------------------------------------------------------------


def violation(state: State) -> str | None:
    for number, period in enumerate(state.periods):
        if sum(attempt.debits for attempt in period.attempts) > 1:
            return f"period {number} is charged twice"
        if sum(attempt.status in LIVE for attempt in period.attempts) > 1:
            return f"period {number} has two live attempts"
        if period.invoice == "paid" and not any(a.debits for a in period.attempts):
            return f"period {number} is paid and no money moved"
        failed = [a for a in period.attempts if a.status in {DECLINED, NOT_CHARGED}]
        if any(a.gateway == "charged" for a in failed):
            return f"period {number}: an attempt that charged is called failed"
    return None


def is_at_rest(state: State, bounds: Bounds) -> bool:
    """Every period opened, no frame running, and each paid or out of its bounded tries."""
    return all(frame is None for frame in state.workers) and all(
        period.invoice == "paid"
        or (
            len(period.attempts) == bounds.attempts
            and all(attempt.status not in LIVE for attempt in period.attempts)
        )
        or any(attempt.fence >= bounds.claims for attempt in period.attempts)
        for period in state.periods
    )


# --- the search --------------------------------------------------------------------------------


@dataclass(slots=True)
class Result:
    states: int
    transitions: int
    violation: str | None = None
    trace: tuple[str, ...] = ()
    stuck: int = 0
    book_moves: frozenset[tuple[str, str]] = frozenset()
    """(before, after) of an attempt's status, as the model allows it."""


def search(rules: Rules = Rules(), bounds: Bounds = Bounds()) -> Result:
    """Breadth first over every reachable state; the first violation has the shortest trace."""
    start = initial(bounds)
    seen: dict[State, int] = {start: 0}
    came: list[tuple[int, str]] = [(0, "start")]
    back: list[list[int]] = [[]]
    at_rest: list[int] = []
    moves: set[tuple[str, str]] = set()
    queue = deque([start])
    transitions = 0
    while queue:
        state = queue.popleft()
        number = seen[state]
        if is_at_rest(state, bounds):
            at_rest.append(number)
        for step in steps(state, rules, bounds):
            transitions += 1
            following = seen.get(step.after)
            if following is None:
                following = seen[step.after] = len(came)
                came.append((number, step.name))
                back.append([])
                queue.append(step.after)
                moves |= _book_moves(state, step.after)
                broken = violation(step.after)
                if broken:
                    return Result(len(came), transitions, broken, _trace(came, following))
            if not step.is_fault:
                back[following].append(number)
    return Result(len(came), transitions, None, (), _stuck(back, at_rest), frozenset(moves))


def _book_moves(before: State, after: State) -> set[tuple[str, str]]:
    return {
        (old.status, new.status)
        for then, now in zip(before.periods, after.periods, strict=True)
        for old, new in zip(then.attempts, now.attempts, strict=False)
        if old.status != new.status
    }


def _trace(came: list[tuple[int, str]], number: int) -> tuple[str, ...]:
    names = []
    while number:
        number, name = came[number]
        names.append(name)
    return tuple(reversed(names))


def _stuck(back: list[list[int]], at_rest: list[int]) -> int:
    """How many states cannot come to rest by sweeps and workers alone, without a fault."""
    reached = bytearray(len(back))
    queue = deque(at_rest)
    for number in at_rest:
        reached[number] = 1
    while queue:
        for before in back[queue.popleft()]:
            if not reached[before]:
                reached[before] = 1
                queue.append(before)
    return len(back) - sum(reached)


DEFENDED_TWICE = "only_a_prepared_attempt_is_armed"
"""Holds even alone, because the fence bars the same door: only without both is it caught."""

MUTANTS = {
    (name,): replace(Rules(), **{name: False})
    for name in Rules.__dataclass_fields__
    if name != DEFENDED_TWICE
}
_BOTH = ("fence_is_compared_when_arming", DEFENDED_TWICE)
MUTANTS[_BOTH] = replace(Rules(), **dict.fromkeys(_BOTH, False))
