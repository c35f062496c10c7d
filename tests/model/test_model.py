"""The model holds, every safeguard it has is needed, and the code moves as the model does."""

from __future__ import annotations

import pytest
import structlog
from sqlalchemy import select

from billing_worker.domain.attempt import TRANSITIONS
from billing_worker.persistence.schema.tables import events
from tests.model.protocol import DEFENDED_TWICE, MUTANTS, Bounds, Rules, search
from tests.simulation.memory import template_bytes
from tests.simulation.simulator import LATE_TOKENS, Simulation, silence_logs

BOUNDS = {
    "one period, two attempts, three claims, two crashes": Bounds(periods=1),
    "two periods, one attempt each": Bounds(attempts=1, claims=2),
    "two periods, two attempts each, no second claim": Bounds(claims=1, crashes=1),
}
LATE_MONEY = {
    (before, after) for before in ("declined", "not_charged") for after in ("succeeded", "surplus")
}
"""Only a gateway that takes back its final word brings these; the model's gateway keeps it."""


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_no_reachable_state_charges_twice_or_is_stuck(bounds):
    result = search(bounds=bounds)
    print(f"\n{result.states:,} states, {result.transitions:,} transitions")
    assert result.violation is None, result.trace
    assert result.stuck == 0
    assert result.states > 10_000


@pytest.mark.parametrize("names", MUTANTS, ids=" and ".join)
def test_without_a_safeguard_the_model_finds_the_accident(names):
    assert search(MUTANTS[names], Bounds(periods=1)).violation is not None


def test_the_safeguard_that_is_defended_twice_holds_alone():
    rules = Rules(**{DEFENDED_TWICE: False})
    assert search(rules, Bounds(periods=1)).violation is None


def test_every_move_of_the_model_is_an_edge_of_the_code_and_no_edge_is_left_out():
    moves = search(bounds=Bounds(periods=1)).book_moves
    edges = {(before, after) for before, ends in TRANSITIONS.items() for after in ends}
    # `surplus` of a submitted attempt needs an invoice that was paid or voided meanwhile.
    assert edges - moves - LATE_MONEY == {("submitted", "surplus")}
    assert moves <= edges


@pytest.fixture
def template(sqlite_template):
    silence_logs()
    yield template_bytes(sqlite_template)
    structlog.reset_defaults()


@pytest.mark.parametrize("first", range(0, 16, 8))
def test_the_histories_of_the_simulation_are_runs_of_the_model(template, first):
    allowed = search(bounds=Bounds(periods=1)).book_moves | {("submitted", "surplus")}
    for seed in range(first, first + 8):
        simulation = Simulation(seed, template)
        simulation.run()
        late = LATE_TOKENS & set(simulation.tokens.values())
        assert moves_of(simulation) <= allowed | (LATE_MONEY if late else set())


def moves_of(simulation):
    """(before, after) of every attempt, replayed from the append-only history."""
    names = {"prepared", "submitted", "succeeded", "declined", "not_charged", "surplus"}
    status: dict[int, str] = {}
    moves = set()
    with simulation.store.reading() as connection:
        for row in connection.execute(select(events).order_by(events.c.id)):
            after = row.kind.removeprefix("attempt.")
            if row.attempt_id is None or after not in names:
                continue
            before = status.get(row.attempt_id)
            assert (before is None) == (after == "prepared"), "an attempt begins prepared, once"
            if before is not None:
                moves.add((before, after))
            status[row.attempt_id] = after
    return moves
