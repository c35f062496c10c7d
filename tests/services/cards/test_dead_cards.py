"""Cards that are refused for good or have expired: nothing is asked of them again."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import update

from billing_worker.domain.card import Card, warning_due
from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.expiry import warn_expiring
from billing_worker.services.dunning import give_up_overdue
from tests.support.cards import ANN, DAY, expiring_card
from tests.support.recovery import (
    add_backup,
    decline_stands,
    events,
    origins,
    replace,
    sold_at,
)


def test_a_hard_decline_makes_the_card_unusable_and_asks_for_another(world):
    world.subscribe("decline_card_is_stolen")
    world.tick()
    assert [one["reason"] for one in events(world, "card.unusable")] == [
        "declined_hard: card_is_stolen"
    ]
    assert len(events(world, "card.needed")) == 1
    world.run_for(40 * DAY, step=5 * DAY)
    assert len(sold_at(world)) == 1


def test_a_dead_card_is_dead_for_every_subscription_that_has_it_and_no_call_is_made(world):
    world.subscribe("decline_card_is_stolen.1", "sub-1", customer=ANN)
    world.tick()
    calls = len(world.transport.sent)
    world.subscribe("decline_card_is_stolen.1", "sub-2", customer=ANN)
    world.tick()
    assert world.explain("sub-2-p0")["attempts"] == []
    assert "card_unusable" in world.explain("sub-2-p0")["reason"]
    assert len(world.transport.sent) == calls


def test_a_card_that_dies_between_claim_and_sale_is_not_sold_and_the_invoice_asks_for_another(
    world,
):
    world.subscribe("approved")
    dies_at = iter([1])

    def dies(request):
        if request.url.endswith("/payment-invoices") and next(dies_at, None):
            with world.store.transaction() as connection:
                connection.execute(update(tables.cards).values(unusable_reason="stolen"))

    world.transport.before_send = dies
    world.tick()
    world.tick()
    assert sold_at(world) == []
    assert world.explain()["reason"] == "card_unusable: stolen"
    assert [one["rule"] for one in events(world, "attempt.forbidden")] == ["card.usable"]


def test_the_backup_card_is_charged_as_soon_as_the_decline_stands_when_the_default_one_is_dead(
    world,
):
    world.subscribe("decline_card_is_stolen")
    add_backup(world, "approved.backup")
    world.tick()
    decline_stands(world)
    assert origins(world) == ["scheduled", "backup"]
    assert world.fate() == "paid"


def test_the_next_period_goes_straight_to_the_backup_card(world):
    world.subscribe("decline_card_is_stolen", ends_after_periods=2)
    add_backup(world, "approved.backup")
    world.run_for(30 * DAY, step=2 * DAY)
    assert origins(world, "sub-1-p1") == ["scheduled"]
    assert world.fate("sub-1-p1") == "paid"


@pytest.mark.parametrize("token", ["decline_insufficient_funds", "decline_auth_3ds_required"])
def test_the_backup_card_is_not_touched_while_the_default_one_may_still_pay(world, token):
    world.subscribe(token)
    add_backup(world, "approved.backup")
    world.run_for(5 * DAY, step=DAY)
    assert origins(world)[0] == "scheduled"
    assert "backup" not in origins(world)
    assert world.debits() == {}


def test_a_card_without_recorded_consent_is_never_a_backup(world):
    world.subscribe("approved.other")
    replace(world, "decline_card_is_stolen")
    world.run_for(3 * DAY, step=DAY)
    assert world.debits() == {}
    with pytest.raises(InvalidInput, match="consent"):
        add_backup_without_consent(world)


def add_backup_without_consent(world):
    from billing_worker.services.cards.new_card import add_backup_card  # noqa: PLC0415
    from tests.support.recovery import card  # noqa: PLC0415

    add_backup_card(
        world.store, world.vault, world.clock, subscription_reference="sub-1",
        card=card("approved.backup"), consent=" ", by="test",
    )  # fmt: skip


def test_an_expired_card_is_not_charged_and_no_call_is_made(world):
    world.subscribe(card=expiring_card(month=12, year=2025))
    world.tick()
    assert world.explain()["reason"] == "card_expired"
    assert world.explain()["attempts"] == []
    assert world.transport.sent == []
    assert len(events(world, "card.needed")) == 1


def test_a_card_is_charged_up_to_the_end_of_its_month(world):
    world.subscribe(card=expiring_card(month=1, year=2026))
    world.tick()
    assert world.fate() == "paid"


def test_an_invoice_that_nobody_gave_a_card_for_is_given_up_after_the_policys_patience(world):
    world.subscribe(card=expiring_card(month=12, year=2025))
    world.tick()
    world.clock.advance(31 * DAY)
    assert give_up_overdue(world.store, world.clock) == 1
    assert world.fate() == "uncollectible"


def test_a_warning_is_told_60_and_15_days_before_the_expiry_and_once_each(world):
    world.subscribe(card=expiring_card(month=4, year=2026))
    told = []
    while world.clock.now() < datetime(2026, 5, 10, tzinfo=UTC):
        if warn_expiring(world.store, world.clock):
            told.append(world.clock.now())
        world.clock.advance(DAY)
    expiry = datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert [(expiry - moment).days for moment in told] == [60, 15]
    assert [one["days"] for one in events(world, "card.expiring")] == [60, 15]


def test_after_a_pause_of_the_sweep_only_the_nearer_warning_is_told():
    card = Card(1, "f", "visa", 4, 2026, None, None)
    now = datetime(2026, 4, 25, tzinfo=UTC)
    assert warning_due(card, None, now) == 15
    assert warning_due(card, 15, now) is None


@pytest.mark.by_hand
def test_nobody_is_warned_about_a_card_that_pays_for_nothing_any_more(world):
    world.subscribe(card=expiring_card(month=2, year=2026))
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(status="cancelled", next_billing_at=None)
        )
    assert warn_expiring(world.store, world.clock) == 0
