"""Violations that the faults have found. Each stays here as a test when it is mended."""

from __future__ import annotations

from datetime import timedelta

from tests.faults.boundaries import HOUR, MINUTE, Sleeps
from tests.faults.scenarios import BREAKS, DIES, scenario
from tests.faults.trials import Trial

LONGER_THAN_THE_GATE = Sleeps(timedelta(seconds=6))
LONGER_THAN_THE_LEASE = Sleeps(2 * MINUTE)
CREATE = "POST /api/payment-invoices #1: before effect"
SALE = "POST /payment/sale #1: before effect"


def test_a_worker_that_slept_right_after_its_commit_sends_no_sale(bench):
    trial = Trial(scenario("approved"), ((LONGER_THAN_THE_GATE, "commit#1 of submit: after"),))
    assert not any("after its commit" in said for said in trial.run(bench).violations)


def test_a_worker_that_slept_for_hours_right_after_its_commit_charges_nobody_twice(bench):
    story = scenario("approved", sale_on_final="charge")
    trial = Trial(story, ((Sleeps(3 * HOUR), "commit#1 of submit: after"),))
    assert not trial.run(bench).charged_twice


def test_a_charge_that_came_too_late_for_its_sale_is_tried_again_without_a_person(bench):
    trial = Trial(scenario("approved"), ((LONGER_THAN_THE_GATE, "monotonic of charge"),))
    assert not trial.run(bench).lost


def test_a_create_that_is_refused_again_after_a_crash_comes_before_a_person(bench):
    story = scenario("rejects_token", "person", "0", horizon=2 * HOUR)
    trial = Trial(story, ((DIES, "POST /api/payment-invoices #1: after effect"),))
    assert trial.run(bench).violations == []


def test_a_refused_create_of_a_lost_claim_does_not_end_what_its_successor_has_sold(bench):
    story = scenario("answer_lost_after", duplicate_create="422")
    trial = Trial(story, ((LONGER_THAN_THE_LEASE, CREATE),))
    assert trial.run(bench).violations == []


def test_a_lost_claim_that_asks_about_earlier_attempts_does_not_end_what_its_successor_has_sold(
    bench,
):
    trial = Trial(
        scenario("answer_lost_after"),
        ((BREAKS, SALE), (LONGER_THAN_THE_LEASE, "commit#2 of claim: after")),
    )
    assert trial.run(bench).violations == []
