"""Why nothing was charged on a day: the rule, who set it, since when, and what has to happen."""

from __future__ import annotations

from datetime import timedelta

import pytest

from billing_worker.domain.errors import InvalidInput
from billing_worker.services.kill_switch import switch
from billing_worker.services.monitoring.silence import record_run
from billing_worker.services.reports.question import explain_any
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.lifecycle import DAY, do
from tests.support.records import monthly

# The world's clock begins at noon of 31 January 2026, UTC.


@pytest.fixture
def ask(world):
    def ask(reference="sub-1", at=None):
        with world.store.reading() as connection:
            return explain_any(connection, reference, world.clock.now(), at=at)

    return ask


@pytest.fixture
def reason(ask):
    """The only reason."""

    def reason(reference="sub-1", at=None):
        told = ask(reference, at)
        assert told["attempts"] == []
        [one] = told["reasons"]
        return one

    return reason


def _days(world, count):
    for _ in range(count):
        world.clock.advance(DAY)
        world.run_for(timedelta(minutes=1))


def _bill(world, token="approved", **fields):
    world.subscribe(token, **fields)
    world.run_for(timedelta(minutes=2))


def test_the_day_of_a_charge_says_what_became_of_it(world, ask):
    _bill(world)
    [attempt] = ask(at="2026-01-31")["attempts"]
    assert (attempt["invoice"], attempt["amount"], attempt["became"]) == (
        "sub-1-p0",
        "9.99",
        "succeeded",
    )


def test_what_is_paid_is_charged_again_when_the_next_period_begins(world, reason):
    _bill(world)
    _days(world, 10)
    told = reason(at="2026-02-05")
    assert told["rule"] == "invoice.paid"
    assert told["needed"] == "Its next period has to begin: 2026-02-28T12:00:00+00:00"


def test_a_pause_names_who_when_why_and_what_ends_it_also_when_it_is_over(world, reason):
    _bill(world)
    do(world, "pause")
    _days(world, 40)
    do(world, "resume", shift_anchor=False)
    told = reason(at="2026-03-05")
    assert told["why"] == "It was paused (asked by phone)"
    assert (told["by"], told["since"]) == ("operator:ann", "2026-01-31T12:02:00+00:00")
    assert told["needed"] == "`billing-worker subscriptions resume sub-1`"
    skipped = reason(at="2026-03-12")
    assert (skipped["rule"], skipped["by"]) == ("subscription.resumed", "operator:ann")


def test_a_decline_names_the_rule_of_its_date_and_the_source(world, reason):
    _bill(world, "decline_insufficient_funds")
    _days(world, 1)
    told = reason(at="2026-02-01")
    assert told["rule"] == "ladder.step 1"
    assert told["needed"] == "Its date has to come: 2026-02-02T09:00:00+00:00"
    assert told["source"].startswith("docs/recovery.md#the-ladder; insufficient_funds: ")


def test_a_dead_card_names_the_command_that_gives_another(world, reason):
    _bill(world, "decline_card_expired")
    _days(world, 3)
    assert "`cards replace sub-1`" in reason(at="2026-02-02")["needed"]


def test_a_network_rule_names_the_networks_own_page(world, ask):
    ann = {"reference_id": "ann"}
    for number in range(11):
        world.subscribe("decline_insufficient_funds.ann", f"sub-{number}", customer=ann)
    world.run_for(timedelta(minutes=2))
    told = [reason for number in range(11) for reason in ask(f"sub-{number}")["reasons"]]
    refused = [one for one in told if one["rule"] == "mastercard.10_declines_in_24_hours"]
    assert refused
    assert {one["source"] for one in refused} == {
        "developers.tabapay.com/docs/excessive-retry-rules"
    }


def test_an_unknown_outcome_says_that_nothing_else_was_tried(world, reason):
    _bill(world, "pending_forever")
    _days(world, 2)
    told = reason(at="2026-02-01")
    assert told["rule"] == "attempt.unknown"
    assert "`billing-worker invoices resolve" in told["needed"]


def test_sales_that_were_off_are_told_with_who_has_switched_them(world, ask):
    switch(world.store, on=False, service=None, by="ann", reason="drill", now=world.clock.now())
    _bill(world)
    world.clock.advance(DAY)
    switch(world.store, on=True, service=None, by="bob", reason="over", now=world.clock.now())
    world.run_for(timedelta(minutes=2))
    waited, off = ask(at="2026-01-31")["reasons"]
    assert waited["why"] == "It waited: sales are switched off"
    assert (off["why"], off["by"]) == ("Sales were switched off (drill)", "ann")


def test_an_outage_is_told_where_a_period_was_opened_late(world, ask):
    record_run(world.ports, "billing.renew")
    world.subscribe(anchor_at=(world.clock.now() + timedelta(hours=1)).isoformat())
    world.clock.advance(2 * DAY)
    world.run_for(timedelta(minutes=2))
    record_run(world.ports, "billing.renew")
    late, silent = ask(at="2026-02-01")["reasons"]
    assert late["rule"] == "period.due"
    assert silent["rule"] == "work.silent"
    assert silent["since"] == "2026-01-31T12:00:00+00:00"


def test_a_held_import_names_the_command_that_lets_it_be_billed(world, reason):
    record = monthly(1, "approved", world.clock.now())
    subscribe(world.store, world.vault, world.clock, [record], by="ann", held=True)
    world.run_for(timedelta(minutes=2))
    told = reason(at="2026-01-31")
    assert (told["rule"], told["by"]) == ("import.held", "ann")
    assert told["needed"] == "`billing-worker subscriptions activate sub-1`"


def test_before_it_was_made_and_after_it_was_cancelled_it_says_so(world, reason):
    _days(world, 2)
    _bill(world)
    assert reason(at="2026-02-01")["rule"] == "subscription.subscribed"
    _days(world, 1)
    do(world, "cancel", at_period_end=False)
    _days(world, 1)
    assert reason(at="2026-02-04")["rule"] == "subscription.cancelled"


def test_a_free_period_names_the_decision(world, reason):
    _bill(world)
    do(world, "reschedule", free_periods=1)
    _days(world, 40)
    told = reason(at="2026-03-05")
    assert told["rule"] == "subscription.changed"
    assert told["needed"] == "Its next period has to begin: 2026-03-31T12:00:00+00:00"


def test_a_day_is_one_of_the_subscriptions_own_time_zone(world, ask):
    _bill(world, timezone="Pacific/Auckland")  # there it is past midnight: 1 February
    assert len(ask(at="2026-02-01")["attempts"]) == 1
    with pytest.raises(InvalidInput, match="is in the future"):
        ask(at="2026-02-02")


def test_a_customer_is_explained_by_all_that_they_have(world, ask):
    ann = {"reference_id": "ann"}
    for number in range(2):
        world.subscribe("approved.ann", f"sub-{number}", customer=ann)
    world.run_for(timedelta(minutes=2))
    told = ask("ann")
    assert [one["subscription"] for one in told["subscriptions"]] == ["sub-1", "sub-0"]


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ("yesterday", "must be a day"),
        ("2026-01-31T12:00", "needs a UTC offset"),
        ("2026-13-01", "must be a day"),
        ("2027-01-01", "is in the future"),
    ],
)
def test_a_date_that_cannot_be_meant_is_refused_with_the_reason(world, ask, at, why):
    _bill(world)
    with pytest.raises(InvalidInput, match=why):
        ask(at=at)


def test_rubbish_is_unknown_and_a_day_of_an_invoice_is_refused(world, ask):
    _bill(world)
    assert ask("' OR 1=1 --") is None
    assert ask("sub-1-p0")["fate"] == "paid"
    with pytest.raises(InvalidInput, match="is about subscriptions"):
        ask("sub-1-p0", at="2026-01-31")
