"""A card that is replaced, what is tried on the new one, and whose card it may be."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.listing import list_cards
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import choose_policy, give_up_overdue
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.subscribe import FOREIGN, subscribe
from tests.support.cards import ANN, DAY, HOUR, card_ids, declines_from_now_on
from tests.support.recovery import (
    add_backup,
    decline_stands,
    origins,
    replace,
    subscription,
)


@pytest.mark.parametrize("token", ["decline_card_is_stolen", "decline_insufficient_funds"])
def test_a_replaced_card_is_tried_at_once_on_what_waits(world, token):
    world.subscribe(token)
    world.tick()
    world.clock.advance(world.ports.timings.decline_stands)
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert origins(world) == ["scheduled", "new_card"]
    assert world.fate() == "paid"
    assert subscription(world).status == "active"


def test_a_replaced_card_is_tried_once_and_then_the_ladder_goes_on_where_it_was(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    planned = world.explain()["next_attempt_at"]
    replace(world, "decline_insufficient_funds.new")
    decline_stands(world)
    assert origins(world) == ["scheduled", "new_card"]
    assert world.explain()["next_attempt_at"] == planned


def test_a_subscription_without_a_card_is_charged_when_it_gets_one(world):
    world.subscribe(None)
    world.tick()
    replace(world, "approved")
    world.tick()
    assert world.fate() == "paid"


def test_a_card_that_arrives_while_an_attempt_is_in_flight_waits_for_its_end(world):
    world.subscribe("approved_later")
    world.tick()
    answer = replace(world, "approved.new")
    assert (answer["tried"], answer["in_flight"]) == ([], ["sub-1-p0"])
    world.run_for(2 * HOUR, step=timedelta(minutes=5))
    assert world.debits() == {"sub-1-p0": 1}


def test_what_may_have_been_paid_is_not_tried_on_a_new_card(world):
    world.subscribe("decline_duplicated_transaction")
    world.tick()
    assert replace(world, "approved.new")["tried"] == []
    world.run_for(DAY, step=HOUR)
    assert world.attempts() == ["declined"]


def test_a_prepared_attempt_on_the_old_card_is_withdrawn_when_the_card_is_replaced(world):
    world.subscribe("decline_card_is_lost")
    world.transport.unreachable = True
    world.tick()
    assert world.attempts() == ["prepared"]
    world.transport.unreachable = False
    replace(world, "approved.new")
    world.run_for(HOUR, step=timedelta(minutes=5))
    assert world.attempts() == ["not_charged", "succeeded"]


def test_a_new_card_is_tried_on_an_invoice_whose_ladder_has_left_it_open(world):
    world.subscribe("decline_insufficient_funds", ends_after_periods=1)
    choose_policy(
        world.store, world.clock, subscription_reference="sub-1", policy="short", by="t", why="t"
    )
    world.run_for(20 * DAY, step=DAY)
    assert world.explain()["reason"].startswith("recovery_ended: ")
    assert world.explain()["status"] == "open"
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert world.fate() == "paid"


def test_a_new_card_is_tried_on_what_an_ended_subscription_still_owes(world):
    world.subscribe("decline_card_is_stolen", ends_after_periods=1)
    world.tick()
    world.clock.advance(31 * DAY)
    give_up_overdue(world.store, world.clock)
    assert (world.fate(), subscription(world).status) == ("uncollectible", "ended")
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert (world.fate(), subscription(world).status) == ("paid", "ended")


def test_a_new_card_is_tried_once_on_an_invoice_whose_token_the_gateway_did_not_know(world):
    world.subscribe("rejects_token", ends_after_periods=1)
    world.tick()
    assert world.explain()["next_attempt_at"] is None
    replace(world, "rejects_token.again")
    world.run_for(2 * DAY, step=HOUR)
    assert origins(world) == ["scheduled", "new_card"]
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert world.fate() == "paid"


def test_a_new_card_of_a_paused_subscription_is_tried_when_it_is_resumed(world):
    world.subscribe("decline_card_is_stolen")
    world.tick()
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    replace(world, "approved.new")
    world.run_for(DAY, step=HOUR)
    assert origins(world) == ["scheduled"]
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="test")
    world.tick()
    assert world.fate() == "paid"


def test_the_same_card_entered_again_is_not_charged_again_for_it_after_its_decline(world):
    world.subscribe("pending_forever.1", ends_after_periods=1)
    world.tick()
    assert replace(world, "pending_forever.1")["in_flight"] == ["sub-1-p0"]
    declines_from_now_on(world)
    world.run_for(HOUR, step=timedelta(minutes=5))
    assert world.attempts() == ["declined"]
    assert world.explain()["next_attempt_at"] > (world.clock.now() + 12 * HOUR).isoformat()


def test_a_token_of_another_customer_is_neither_stored_nor_charged(world):
    world.subscribe("decline_card_is_stolen", "sub-1")
    world.subscribe("approved.2", "sub-2")
    before = card_ids(world)
    for store_it in (replace, add_backup):
        with pytest.raises(InvalidInput, match="another customer") as refused:
            store_it(world, "approved.2", "sub-1")
        assert refused.value.field == "card.token"
    order = {"reference_id": "buy-1", "customer": ANN, "amount": "1.00", "currency": "USD",
             "card": {"token": "approved.2"}}  # fmt: skip
    answer = carry_out(world.ports, Message("billing.charge_once", order))
    assert [fault.field for fault in answer.errors] == ["card.token"]
    assert card_ids(world) == before


def test_a_record_with_the_token_of_another_customer_is_refused_and_the_others_are_added(world):
    world.subscribe("approved.1", "sub-1")
    record = {"amount": "1.00", "currency": "USD", "interval": "month",
              "anchor_at": world.clock.now().isoformat()}  # fmt: skip
    ours, theirs, twice, good = (
        parse_record(
            record
            | {"reference_id": reference, "card": {"token": token}}
            | {"customer": {"reference_id": customer}}
        )
        for reference, customer, token in (
            ("new-1", "customer-of-sub-1", "approved.1"),
            ("new-2", "ann", "approved.1"),
            ("new-3", "bob", "approved.4"),
            ("new-4", "ann", "approved.4"),
        )
    )
    for dry_run in (True, False):
        done = subscribe(
            world.store, world.vault, world.clock, [ours, theirs, twice, good],
            by="test", dry_run=dry_run,
        )  # fmt: skip
        assert done.outcomes == ("added", FOREIGN, "added", FOREIGN)
    with world.store.reading() as connection:
        known = set(connection.execute(select(tables.subscriptions.c.reference_id)).scalars())
    assert known == {"sub-1", "new-1", "new-3"}


def test_a_command_with_the_token_of_another_customer_is_refused_by_its_field(world):
    world.subscribe("approved.1", "sub-1")
    record = {"reference_id": "sub-9", "customer": ANN, "card": {"token": "approved.1"},
              "amount": "1.00", "currency": "USD", "interval": "month",
              "anchor_at": world.clock.now().isoformat()}  # fmt: skip
    answer = carry_out(world.ports, Message("billing.subscribe", record))
    assert [(fault.field, fault.reason) for fault in answer.errors] == [
        ("card.token", "belongs to another customer")
    ]


@pytest.mark.parametrize(
    ("token", "changes", "field"),
    [
        ("decline_card_is_stolen.1", {}, "card.token"),
        ("approved.new", {"expiry_year": 2025}, "card.expiry_year"),
    ],
)
def test_a_card_that_cannot_be_charged_replaces_nothing(world, token, changes, field):
    world.subscribe("decline_card_is_stolen.1")
    world.tick()
    before = subscription(world).card_id
    with pytest.raises(InvalidInput) as refused:
        replace(world, token, **changes)
    assert refused.value.field == field
    assert subscription(world).card_id == before


def test_the_list_of_cards_tells_their_roles_and_no_token(world):
    world.subscribe("decline_card_is_stolen")
    add_backup(world, "approved.backup")
    world.tick()
    with world.store.reading() as connection:
        default, backup = list_cards(connection, "sub-1", world.clock.now())
    assert default["default_for"] == ["sub-1"]
    assert default["not_chargeable"] == "card_unusable: declined_hard: card_is_stolen"
    assert backup["backup"] == "test: ticked at checkout"
    assert not {"token", "fingerprint"} & (default.keys() | backup.keys())
