"""Declines through the whole worker, on both databases, against the twin."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence import switches
from billing_worker.persistence.schema import tables
from billing_worker.services.doorbell import ring_due
from billing_worker.services.dunning import choose_policy, give_up_overdue
from tests.support.recovery import (
    banks_change_their_mind,
    decline_stands,
    events,
    origins,
    replace,
    retry,
    sold_at,
    subscription,
)

DAY = timedelta(days=1)
HALF_A_DAY = timedelta(hours=12)
NEVER_DUE_AGAIN = {"ends_after_periods": 1}


def test_a_soft_decline_climbs_the_ladder_and_ends_in_suspension(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=DAY)
    assert origins(world) == ["scheduled", "dunning", "dunning", "dunning", "dunning"]
    days = [(later - sold_at(world)[0]).days for later in sold_at(world)[1:]]
    assert days == [2, 7, 14, 21]
    assert world.fate() == "uncollectible"
    assert subscription(world).status == "suspended"
    assert subscription(world).next_billing_at is None


def test_each_failure_tells_which_attempt_of_how_many_what_follows_and_what_is_at_stake(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=DAY)
    told = events(world, "payment.failed")
    assert [(one["attempt"], one["of"]) for one in told] == [(n, 5) for n in range(1, 6)]
    assert [one["next_attempt_at"] for one in told[:2]] == [
        "2026-02-02T09:00:00+00:00",
        "2026-02-07T09:00:00+00:00",
    ]
    assert {one["consequence"] for one in told} == {"suspend"}
    assert [one["follows"] for one in told] == ["retry"] * 4 + ["end"]
    assert events(world, "recovery.ended")[0]["end"] == "suspend"
    assert len(events(world, "subscription.suspended")) == 1


def test_a_retry_that_is_paid_recovers_the_invoice_and_moves_no_renewal_date(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(DAY, step=HALF_A_DAY)
    banks_change_their_mind(world, "approved")
    world.run_for(2 * DAY, step=HALF_A_DAY)
    assert world.fate() == "paid"
    assert [one["origin"] for one in events(world, "payment.recovered")] == ["dunning"]
    assert subscription(world).status == "active"
    assert subscription(world).next_billing_at == datetime(2026, 2, 28, 12, 0, tzinfo=UTC)


def test_late_money_pays_an_uncollectible_invoice_and_brings_the_subscription_back(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=DAY)
    banks_change_their_mind(world, "approved")
    retry(world)
    world.tick()
    assert world.fate() == "paid"
    assert subscription(world).status == "active"
    # The period that began while it was suspended is not charged afterwards.
    assert subscription(world).next_billing_at == datetime(2026, 2, 28, 12, 0, tzinfo=UTC)


def test_a_technical_decline_is_retried_the_next_day_and_then_waits_for_a_person(world):
    world.subscribe("decline_fatal_error", **NEVER_DUE_AGAIN)
    world.run_for(10 * DAY, step=DAY)
    assert origins(world) == ["scheduled", "dunning"]
    assert world.fate() == "open, waiting for a person"


@pytest.mark.parametrize("token", ["decline_duplicated_transaction", "decline_never_documented"])
def test_what_may_have_been_paid_waits_for_a_person_and_raises_an_alert(world, token):
    world.subscribe(token, **NEVER_DUE_AGAIN)
    world.run_for(40 * DAY, step=5 * DAY)
    assert origins(world) == ["scheduled"]
    assert world.fate() == "open, waiting for a person"
    assert any(event["alert"] for event in world.explain()["history"])


def test_a_refused_configuration_pauses_the_service_after_one_attempt_and_spares_the_others(world):
    world.subscribe("decline_invalid_credentials", **NEVER_DUE_AGAIN)
    world.tick()
    for number in range(2, 6):
        world.subscribe("decline_invalid_credentials", f"sub-{number}", **NEVER_DUE_AGAIN)
    world.run_for(2 * DAY, step=HALF_A_DAY)
    assert [origins(world, f"sub-{n}-p0") for n in range(1, 6)] == [["scheduled"], [], [], [], []]
    assert "payment_card_usd_hpp is paused" in world.explain("sub-3-p0")["reason"]
    assert [one["service"] for one in events(world, "service.paused")] == ["payment_card_usd_hpp"]


def test_a_resumed_service_charges_what_waited_and_no_step_of_the_ladder_is_lost(world):
    world.subscribe("decline_invalid_credentials", **NEVER_DUE_AGAIN)
    world.run_for(DAY, step=HALF_A_DAY)
    banks_change_their_mind(world, "approved")
    with world.store.transaction() as connection:
        assert switches.resume_service(connection, "payment_card_usd_hpp")
    world.run_for(HALF_A_DAY, step=HALF_A_DAY)
    assert origins(world) == ["scheduled", "scheduled"]
    assert world.fate() == "paid"


def test_a_charge_in_another_currency_is_not_paused(world):
    world.subscribe("decline_invalid_credentials", **NEVER_DUE_AGAIN)
    world.tick()
    world.subscribe("approved", "sub-2", currency="EUR", **NEVER_DUE_AGAIN)
    world.tick()
    assert world.fate("sub-2-p0") == "paid"


def test_a_manual_retry_takes_no_step_and_leaves_the_next_date_alone(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.clock.advance(timedelta(hours=3))
    planned = world.explain()["next_attempt_at"]
    retry(world)
    world.tick()
    assert origins(world) == ["scheduled", "manual"]
    assert world.explain()["next_attempt_at"] == planned
    assert [one["attempt"] for one in events(world, "payment.failed")] == [1, 1]


def test_a_manual_retry_never_becomes_a_second_live_attempt(world):
    world.subscribe("answer_lost_before")
    world.tick()
    with pytest.raises(InvalidInput, match="an attempt is under way"):
        retry(world)


def test_a_manual_retry_of_a_paid_invoice_is_refused(world):
    world.subscribe("approved")
    world.tick()
    with pytest.raises(InvalidInput, match="the invoice is paid"):
        retry(world)


def be_declined_ten_times(world):
    """As often as the network allows within a day."""
    world.subscribe("decline_insufficient_funds", **NEVER_DUE_AGAIN)
    world.tick()
    for _ in range(9):
        retry(world)
        decline_stands(world)


def test_a_manual_retry_past_a_network_limit_is_refused_with_the_rule(world):
    be_declined_ten_times(world)
    with pytest.raises(InvalidInput, match=r"mastercard\.10_declines_in_24_hours"):
        retry(world)
    assert len(world.attempts()) == 10


def test_an_attempt_past_a_network_limit_is_refused_at_the_last_moment_and_comes_when_allowed(
    world,
):
    be_declined_ten_times(world)
    due_now(world)
    decline_stands(world)
    assert world.attempts() == ["declined"] * 10 + ["not_charged"]
    assert [one["rule"] for one in events(world, "attempt.forbidden")] == [
        "mastercard.10_declines_in_24_hours"
    ]
    assert world.explain()["next_attempt_at"] == "2026-02-01T12:00:00+00:00"
    world.run_for(2 * DAY, step=HALF_A_DAY)
    assert origins(world)[-1] == "dunning"


def due_now(world):
    """As if the ladder's next step had come while the limit still holds."""
    now = world.clock.now()
    with world.store.transaction() as connection:
        connection.execute(update(tables.invoices).values(next_attempt_at=now, enqueue_at=now))


def test_equal_tokens_of_two_subscriptions_share_one_budget(world):
    for number in range(1, 7):
        world.subscribe(
            "decline_insufficient_funds.1", f"sub-{number}", customer={"reference_id": "ann"},
            **NEVER_DUE_AGAIN,
        )  # fmt: skip
    world.tick()
    for number in range(1, 5):
        retry(world, f"sub-{number}-p0")
    decline_stands(world)
    with pytest.raises(InvalidInput, match=r"mastercard\.10_declines"):
        retry(world, "sub-5-p0")


def test_the_next_period_waits_while_an_older_one_is_being_recovered(world):
    world.subscribe("decline_insufficient_funds", interval="week")
    world.run_for(10 * DAY, step=DAY)
    assert origins(world, "sub-1-p1") == []
    assert world.explain("sub-1-p1")["reason"] == "an older invoice comes first"
    banks_change_their_mind(world, "approved")
    world.run_for(5 * DAY, step=HALF_A_DAY)
    assert world.fate("sub-1-p0") == world.fate("sub-1-p1") == "paid"


def test_a_customer_who_takes_no_step_is_waited_for_until_the_policy_ends_it(world):
    world.subscribe("decline_auth_3ds_required", **NEVER_DUE_AGAIN)
    world.run_for(27 * DAY, step=3 * DAY)
    assert give_up_overdue(world.store, world.clock) == 0
    world.clock.advance(4 * DAY)
    assert give_up_overdue(world.store, world.clock) == 1
    assert give_up_overdue(world.store, world.clock) == 0
    assert world.attempts() == ["declined"]
    assert world.fate() == "uncollectible"


@pytest.mark.parametrize(
    ("policy", "status", "fate"),
    [
        ("short", "past_due", "open, waiting for a person"),
        ("classic", "cancelled", "uncollectible"),
        ("standard", "suspended", "uncollectible"),
    ],
)
def test_the_end_of_the_ladder_is_the_policys(world, policy, status, fate):
    world.subscribe("decline_insufficient_funds")
    choose_policy(world.store, world.clock, subscription_reference="sub-1", policy=policy,
                  by="ann", why="contract")  # fmt: skip
    world.run_for(26 * DAY, step=DAY)
    assert subscription(world).status == status
    assert world.fate() == fate


def test_a_cancelled_subscription_is_not_dunned(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(status="cancelled", next_billing_at=None)
        )
    world.run_for(5 * DAY, step=HALF_A_DAY)
    assert len(sold_at(world)) == 1


def test_polling_again_many_times_climbs_no_step(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    with world.store.transaction() as connection:
        connection.execute(update(tables.attempts).values(next_poll_at=world.clock.now()))
    for _ in range(20):
        world.run("look", (1,))
    assert len(events(world, "payment.failed")) == 1
    assert world.explain()["next_attempt_at"] == "2026-02-02T09:00:00+00:00"
    ring_due(world.ports)
    assert world.bell.messages == []


def test_a_new_card_during_suspension_pays_the_debt_and_brings_the_subscription_back(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=DAY)
    assert replace(world, "approved")["tried"] == ["sub-1-p0"]
    world.tick()
    assert world.fate() == "paid"
    assert subscription(world).status == "active"


def test_thirty_subscriptions_of_one_price_on_one_visa_card_do_not_spend_each_others_tries(world):
    card = {"token": "decline_insufficient_funds.ann", "brand": "visa"}
    names = [f"sub-{n}" for n in range(30)]
    for name in names:
        world.subscribe(
            card=card, reference=name, customer={"reference_id": "ann"}, ends_after_periods=1
        )
    world.tick()
    assert {tuple(world.attempts(f"{name}-p0")) for name in names} == {("declined",)}
    banks_change_their_mind(world, "approved")
    world.run_for(3 * DAY, step=HALF_A_DAY)
    assert {world.fate(f"{name}-p0") for name in names} == {"paid"}


def equal_ones(world, first, second, apart=timedelta(hours=1)):
    """Two subscriptions of one card and price, charged one after the other."""
    card = {"token": "approved.ann"}
    for reference, token in (("sub-1", first), ("sub-2", second)):
        world.subscribe(card=card, reference=reference, customer={"reference_id": "ann"})
        banks_change_their_mind(world, token)
        world.run_for(apart, step=timedelta(minutes=5))


def test_a_duplicate_of_another_charge_of_the_card_is_explained_by_it_and_tried_the_next_day(world):
    equal_ones(world, "approved", "decline_duplicated_transaction")
    said = events(world, "attempt.declined")[-1]
    assert said["equal_charge"].endswith("sub-1-p0-a1")
    assert world.explain("sub-2-p0")["fate"] == "open, next attempt dated"
    banks_change_their_mind(world, "approved")
    world.run_for(2 * DAY, step=HALF_A_DAY)
    assert world.debits() == {"sub-1-p0": 1, "sub-2-p0": 1}
    assert world.alerts() == []


@pytest.mark.parametrize("token", ["decline_insufficient_funds", "decline_error"])
def test_a_duplicate_that_no_charge_of_the_card_explains_waits_for_a_person(world, token):
    equal_ones(world, token, "decline_duplicated_transaction")
    assert world.explain("sub-2-p0")["fate"] == "open, waiting for a person"


def test_a_duplicate_is_unknown_for_as_long_as_the_charge_that_may_explain_it(world):
    minutes = timedelta(minutes=15)
    equal_ones(world, "pending_forever", "decline_duplicated_transaction", apart=minutes)
    assert world.fate("sub-2-p0") == "unknown"
    assert "sub-1-p0-a1 is undecided" in str(events(world, "attempt.looked"))


def test_a_duplicate_after_a_try_that_may_have_succeeded_waits_for_a_person(world):
    world.subscribe("decline_timeout", customer={"reference_id": "ann"})
    world.tick()
    world.clock.advance(20 * timedelta(hours=1))
    world.subscribe("approved.ann", "sub-2", customer={"reference_id": "ann"})
    banks_change_their_mind(world, "approved")
    with world.store.transaction() as connection:  # both on one card
        ids = [row.card_id for row in connection.execute(tables.subscriptions.select())]
        connection.execute(update(tables.subscriptions).values(card_id=ids[0]))
    world.tick()
    banks_change_their_mind(world, "decline_duplicated_transaction")
    world.run_for(DAY, step=timedelta(hours=2))
    assert world.explain("sub-1-p0")["fate"] == "open, waiting for a person"
