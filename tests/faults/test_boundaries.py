"""The process dies, sleeps or loses the line at every boundary: never charged twice, never lost.

`python -m tests.faults` prints the counts of all of it in one line each.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.faults.scenarios import (
    ANSWERS,
    BREAKS,
    DIES,
    DIES_WITH_THE_BROKER,
    DUPLICATE_CREATES,
    EVERYTHING,
    EXPIRIES,
    FINALS,
    LIES,
    MAIN,
    MISSTATEMENTS,
    NAPS,
    SECOND_SALES,
)
from tests.faults.tally import pairs, singles, strikes


def named(scenarios):
    return pytest.mark.parametrize("scenario", scenarios, ids=lambda scenario: scenario.name)


def assert_unharmed(tally):
    print(f"\n{tally}")
    assert tally.bad == []
    assert (tally.charged_twice, tally.lost) == (0, 0)


QUICK = (*DUPLICATE_CREATES, *SECOND_SALES, *ANSWERS, *FINALS[:2], *FINALS[4:], *MISSTATEMENTS)


@named(QUICK)
def test_a_process_may_die_at_any_boundary(bench, scenario):
    assert_unharmed(singles(bench, scenario, [DIES]))


def test_a_process_may_die_with_the_broker_at_any_boundary_of_a_plain_charge(bench):
    assert_unharmed(singles(bench, MAIN, [DIES_WITH_THE_BROKER], all_of_them=True))


def test_deaths_between_which_nothing_happened_outside_leave_the_same_world(bench):
    """The licence for running only one of such deaths elsewhere. Here none is left out."""
    crossings = bench.run(MAIN).crossings
    worlds = defaultdict(set)
    for crossing in crossings:
        outcome = bench.run(MAIN, [(crossing.number, DIES)])
        assert outcome.violations == []
        worlds[crossing.world].add(outcome.digest)
    assert {len(digests) for digests in worlds.values()} == {1}
    assert len(worlds) == len(list(strikes(crossings, DIES, all_of_them=False))) < len(crossings)


def test_a_process_may_die_twice_at_any_two_boundaries(bench):
    assert_unharmed(pairs(bench, MAIN, [DIES], [DIES]))


MEETINGS = [s for s in DUPLICATE_CREATES if s.token in {"approved", "answer_lost_after"}]


@pytest.mark.parametrize("fault", [BREAKS, LIES, *NAPS], ids=str)
@pytest.mark.parametrize("scenario", [
    pytest.param(s, id=s.name, marks=[] if s.token == MAIN.token else pytest.mark.again)
    for s in MEETINGS
    if s.behaviour.duplicate_create == "accept_new"
])  # fmt: skip
def test_a_process_may_lose_the_line_or_sleep_at_any_boundary(bench, scenario, fault):
    assert_unharmed(singles(bench, scenario, [fault]))


@pytest.mark.again
@named([MAIN, *(s for s in DUPLICATE_CREATES[:4] if s.token.endswith(("after", "later")))])
def test_a_process_may_die_at_any_boundary_on_postgresql(postgres_bench, scenario):
    assert_unharmed(singles(postgres_bench, scenario, [DIES]))


@pytest.mark.long
@pytest.mark.timeout(0)
@named((*FINALS[2:4], *EXPIRIES))
def test_a_process_may_die_at_any_boundary_of_a_long_story(bench, scenario):
    assert_unharmed(singles(bench, scenario, [DIES]))


@pytest.mark.long
@pytest.mark.timeout(0)
@named(EVERYTHING)
def test_anything_may_go_wrong_at_any_boundary_of_any_scenario(bench, scenario):
    assert_unharmed(singles(bench, scenario, [DIES_WITH_THE_BROKER, BREAKS, LIES, *NAPS]))


@pytest.mark.long
@pytest.mark.timeout(0)
@named([scenario for scenario in EVERYTHING if scenario not in EXPIRIES])
def test_a_process_may_die_twice_in_any_scenario(bench, scenario):
    assert_unharmed(pairs(bench, scenario, [DIES], [DIES]))


@pytest.mark.long
@pytest.mark.timeout(0)
@named(MEETINGS)
def test_any_fault_may_be_followed_by_any_other(bench, scenario):
    anything = [DIES, DIES_WITH_THE_BROKER, BREAKS, LIES, *NAPS]
    assert_unharmed(pairs(bench, scenario, anything, anything))
