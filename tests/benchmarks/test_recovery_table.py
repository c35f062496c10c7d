"""Ladders compared on the same year of declines.

pytest -m benchmark -s tests/benchmarks/test_recovery_table.py
"""

from __future__ import annotations

import pytest

from tests.benchmarks.recovery_table import (
    DAYS,
    LADDERS,
    SUBSCRIPTIONS,
    customers,
    simulate,
    table,
)

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(300)]


def test_ladders_compared_on_the_same_year():
    population = customers(seed=1)
    results = {policy.name: simulate(policy, population) for policy in LADDERS}
    print(f"\n{SUBSCRIPTIONS} subscriptions, {DAYS} days, seed 1\n{table(list(results.values()))}")
    assert len({one.invoices for one in results.values()}) == 1  # the same year for all
    ours, daily = results["Polar = our standard"], results["Solidus (daily, no end)"]
    assert ours.recovered > 5 * results["no retry"].recovered
    # Three attempts, not six, bring what daily ones bring; only those meet a limit of attempts.
    assert ours.recovered > 0.95 * daily.recovered
    assert 3 * ours.retries < daily.retries
    assert "visa.20_reattempts_in_30_days" in daily.refused
    assert "visa.20_reattempts_in_30_days" not in ours.refused
