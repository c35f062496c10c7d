"""A suite that cannot fail proves nothing: each safeguard is taken out, and the faults must tell."""

from __future__ import annotations

import pytest

from tests.faults.safeguards import SAFEGUARDS
from tests.faults.safeguards_of_books import ON_POSTGRESQL
from tests.faults.trials import caught, invariants, trials


def named(safeguards):
    return pytest.mark.parametrize("safeguard", safeguards, ids=lambda one: one.name)


def test_with_every_safeguard_in_place_no_trial_finds_fault(bench):
    bench.forget()
    assert [str(o) for trial in trials(SAFEGUARDS) if (o := trial.run(bench)).violations] == []


@named([one for one in SAFEGUARDS if not one.covered_by])
def test_the_lack_of_a_safeguard_is_noticed(bench, safeguard):
    outcome = caught(bench, safeguard)
    assert outcome is not None, "the mutant survived"
    print(f"\ncaught by {', '.join(invariants(outcome))}\n{outcome}")


@pytest.mark.again
@named(ON_POSTGRESQL)
def test_the_lack_of_a_safeguard_on_postgresql_is_noticed(postgres_bench, safeguard):
    bench = postgres_bench
    assert [str(o) for trial in safeguard.trials if (o := trial.run(bench)).violations] == []
    outcome = caught(bench, safeguard)
    assert outcome is not None, "the mutant survived"
    print(f"\ncaught by {', '.join(invariants(outcome))}\n{outcome}")


@named([one for one in SAFEGUARDS if one.covered_by])
def test_a_safeguard_with_a_double_is_not_missed_alone(bench, safeguard):
    assert caught(bench, safeguard) is None
