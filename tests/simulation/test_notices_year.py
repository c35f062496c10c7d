from __future__ import annotations

import pytest
import structlog

from tests.simulation.memory import template_bytes
from tests.simulation.notices_year import simulate
from tests.simulation.simulator import silence_logs


@pytest.fixture(scope="module")
def template(sqlite_template):
    silence_logs()
    yield template_bytes(sqlite_template)
    structlog.reset_defaults()


def judge(year):
    late, needed = year.told_too_late()
    events = year.events()
    print(
        f"\n{len(year.sales())} sales, {needed} of them wait for a notice; {len(events)} events, "
        f"{len(year.shop.taken)} taken by a shop that failed half of the time and died for two weeks"
    )
    assert late == []
    assert year.untold() == []
    assert year.unmatched(events) == []
    assert year.misled(events) == []
    assert year.misled([event for _, event in year.shop.taken]) == []
    assert year.out_of_order() == []
    assert year.world.discrepancies() == []
    return needed


def test_in_a_year_of_forty_no_charge_comes_before_its_notice_and_the_events_tell_the_books(
    template,
):
    assert judge(simulate(template, 40, seed=1, sweeps_a_day=2)) > 100


@pytest.mark.long
@pytest.mark.timeout(1_800)
def test_in_a_year_of_a_thousand_no_charge_comes_before_its_notice(template):
    assert judge(simulate(template, 1_000, seed=2, sweeps_a_day=6)) > 5_000
