"""A card that goes, and comes back; on both databases."""

from __future__ import annotations

from datetime import timedelta
from threading import Thread

import pytest
from sqlalchemy import select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.listing import list_cards
from billing_worker.services.commands.execute import Message, carry_out
from tests.support.recovery import events, replace
from tests.support.world import World

HOUR = timedelta(hours=1)
ANN = {"reference_id": "ann"}


def remove(world: World, card_id: int, reference: str = "rm-1", customer: str = "ann"):
    asked = {"reference_id": reference, "customer": customer, "card_id": card_id}
    return carry_out(world.ports, Message("billing.remove_card", asked)).as_json()


def numbers(world):
    with world.store.reading() as connection:
        return [card["card_id"] for card in list_cards(connection, "ann", world.clock.now())]


def stored(world, card_id):
    with world.store.reading() as connection:
        query = select(tables.cards).where(tables.cards.c.id == card_id)
        return connection.execute(query).one()


def test_a_removed_card_is_forgotten_with_its_token_and_listed_no_more(world):
    world.subscribe("approved.old", customer=ANN)
    world.tick()
    [old] = numbers(world)
    replace(world, "approved.new")
    assert remove(world, old)["card"]["outcome"] == "changed"
    assert old not in numbers(world)
    assert stored(world, old).token == b""
    assert len(events(world, "card.removed")) == 1
    assert remove(world, old, "rm-2")["card"]["outcome"] == "unchanged"
    assert world.explain()["attempts"][0]["status"] == "succeeded"


def test_a_card_that_pays_a_subscription_is_not_removed_and_the_answer_says_which(world):
    world.subscribe("approved", customer=ANN)
    answer = remove(world, numbers(world)[0])
    assert answer["status"] == "refused"
    assert "pays sub-1" in answer["errors"][0]["reason"]


def test_a_card_that_is_being_charged_is_not_removed(world):
    world.subscribe("pending_forever.old", customer=ANN)
    world.tick()
    [old] = numbers(world)
    replace(world, "approved.new")
    assert "is being charged" in remove(world, old)["errors"][0]["reason"]


def test_a_card_of_somebody_else_is_not_removed(world):
    world.subscribe("approved", customer=ANN)
    world.subscribe("approved.bob", "sub-2", customer={"reference_id": "bob"})
    answer = remove(world, numbers(world)[0], customer="bob")
    assert answer["errors"][0]["field"] == "card_id"


def test_a_removed_card_that_is_given_again_is_charged_again(world):
    world.subscribe("approved.old", customer=ANN, ends_after_periods=2)
    [old] = numbers(world)
    replace(world, "decline_card_is_stolen.new")
    remove(world, old)
    assert replace(world, "approved.old")["card_id"] == old
    world.tick()
    assert world.fate() == "paid"


def test_a_card_that_is_being_given_to_a_subscription_is_not_removed_meanwhile(world):
    world.subscribe("approved.old", customer=ANN)
    world.tick()
    [old] = numbers(world)
    replace(world, "approved.new")
    answers = []
    removing = Thread(target=lambda: answers.append(remove(world, old)))
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(card_id=old))
        removing.start()
        removing.join(0.3)
    removing.join()
    assert "pays sub-1" in answers[0]["errors"][0]["reason"]
    assert stored(world, old).token != b""


def test_what_the_bank_says_of_a_removed_card_holds_when_it_is_given_again(world):
    world.subscribe("pending_forever.old", customer=ANN)
    world.tick()
    while world.attempts() != ["not_charged"]:
        world.run_for(HOUR, step=HOUR)
    [old] = numbers(world)
    replace(world, "approved.new")
    remove(world, old)
    books = world.sandbox._books
    invoice = books.with_id(world.explain()["attempts"][0]["gateway_id"])
    invoice.status, invoice.resolution = "process_failed", "card_is_stolen"
    world.run_for(24 * HOUR, step=HOUR)
    assert "card_is_stolen" in str(stored(world, old).unusable_reason)
    with pytest.raises(InvalidInput, match="cannot be charged"):
        replace(world, "pending_forever.old")
