from __future__ import annotations

from datetime import timedelta

import pytest
import structlog

from tests.simulation.memory import template_bytes
from tests.simulation.simulator import silence_logs
from tests.simulation.year import recovery_times, simulate_a_year


@pytest.fixture(scope="module")
def template(sqlite_template):
    silence_logs()
    yield template_bytes(sqlite_template)
    structlog.reset_defaults()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_year_of_a_thousand_subscriptions_ends_with_equal_books(template):
    figures = simulate_a_year(template)
    print(f"\n1,000 subscriptions, 365 days: {figures}")
    assert figures["debits"] == figures["paid"]


@pytest.mark.parametrize("hours", [0.5, 3], ids="{} h outage".format)
def test_unknown_outcomes_are_known_within_ten_minutes_of_the_gateways_return(template, hours):
    times = recovery_times(template, timedelta(hours=hours))
    percentiles = {p: times[min(len(times) - 1, len(times) * p // 100)] for p in (50, 90, 99)}
    print(f"\nafter {hours} h: seconds until known, by percentile {percentiles}, last {times[-1]}")
    assert percentiles[99] <= 600
