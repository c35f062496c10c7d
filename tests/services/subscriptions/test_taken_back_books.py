"""A subscription that is taken back after the book it was handed over to has billed it."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import closing
from datetime import timedelta

import pytest

from billing_worker.domain.secret import Secret
from billing_worker.persistence.book import identity
from billing_worker.persistence.store import Store
from billing_worker.services import kill_switch
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.import_records.export import leaving
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.subscriptions import hand_over as moving
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.books import name_book
from tests.support.world import START, World

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
OTHER = {"identity": "anotherbook", "prefix": "anothr-"}
ONE_OFF = {
    "reference_id": "extra-1", "customer": {"reference_id": "jo"}, "amount": "5.00",
    "currency": "USD", "card": {"token": "approved.jo"},
}  # fmt: skip
NEW = {
    "reference_id": "sub-new", "customer": {"reference_id": "jo"}, "amount": "5.00",
    "currency": "USD", "card": {"token": "approved.jo"}, "interval": "month",
    "anchor_at": START.isoformat(),
}  # fmt: skip


@pytest.fixture
def world(store):
    """Not compared with the ledger afterwards: the other book charges there too."""
    name_book(store, prefix="k2m4p6-")
    return World(store)


@pytest.fixture
def other(world, sqlite_template, tmp_path):
    path = tmp_path / "other.db"
    shutil.copy(sqlite_template, path)
    with closing(Store(f"sqlite:///{path}")) as store:
        name_book(store, **OTHER)
        yield World(store, beside=world)


def hand_over(giving, taking):
    """What was new there is added; what it had before is taken back."""
    rows = list(moving.hand_over(giving.store, giving.clock, by="ann", why="moves"))
    with giving.store.reading() as connection:
        book = identity.read(connection)
    records = [leaving(row, giving.vault, book) for row in rows]
    subscribe(taking.store, taking.vault, taking.clock, records, by="test")


def take_back(book, other=None):
    moving.take_back(book.store, book.clock, None, by="ann", why="back", other=other)


def turn_sales(world, *, on):
    kill_switch.switch(
        world.store, on=on, service=None, by="ann", reason="back", now=world.clock.now(),
        restored=True, outside=world.outside,
    )  # fmt: skip


def fence(book):
    list(moving.hand_over(book.store, book.clock, by="ann", why="moves"))


def send(world, task, **arguments):
    return carry_out(world.ports, Message(f"billing.{task}", arguments)).as_json()["status"]


def debits(world):
    """By our invoice, whatever prefix its reference has."""
    found = Counter()
    for name, count in world.debits(everybody=True).items():
        found[name.removeprefix("k2m4p6-").removeprefix("anothr-")] += count
    return found


@pytest.mark.parametrize(
    "token", ["approved", "approved_later", "answer_lost_after", "late_after_expiry"]
)
def test_a_period_that_the_other_book_has_billed_is_debited_once(world, other, token):
    world.subscribe("approved", interval="week")
    world.tick()
    hand_over(world, other)
    world.clock.advance(7 * DAY)
    give_card(other, token)
    other.tick()
    fence(other)
    take_back(world)
    for _ in range(100):
        world.tick()
        other.tick()
        world.clock.advance(HOUR)
    assert debits(world)["sub-1-p1"] == 1
    assert world.fate("sub-1-p1") == "paid"


def give_card(world, token):
    card = CardRecord(Secret(f"{token}.customer-of-sub-1"), None, None, None, None)
    replace_card(
        world.store, world.vault, world.clock,
        subscription_reference="sub-1", card=card, by="ann", why=None,
    )  # fmt: skip


def test_a_book_that_goes_there_and_back_twice_bills_each_period_once(world, other):
    world.subscribe("approved", interval="week")
    world.tick()
    hand_over(world, other)
    for giving, taking in [(other, world), (world, other), (other, world)]:
        world.clock.advance(7 * DAY)
        giving.tick()
        fence(giving)
        take_back(taking)
        taking.run_for(2 * HOUR, step=HOUR / 4)
    assert debits(world) == {"sub-1-p0": 1, "sub-1-p1": 1, "sub-1-p2": 1, "sub-1-p3": 1}


@pytest.mark.parametrize(("task", "asked"), [("charge_once", ONE_OFF), ("subscribe", NEW)])
def test_what_began_in_the_other_book_and_is_sent_again_is_debited_once(world, other, task, asked):
    hand_over(world, other)
    assert send(other, task, **asked) == "done"
    other.run_for(HOUR)
    fence(other)
    take_back(world, other=identity.Other(**OTHER))
    world.clock.advance(DAY)
    assert send(world, task, **asked) == "done"
    world.run_for(2 * HOUR, step=HOUR / 4)
    reference = f"{asked['reference_id']}-p0"
    assert debits(world) == {reference: 1}
    assert world.fate(reference) == "paid"


def test_a_book_whose_references_have_no_prefix_stops_and_tells_a_person(world, other):
    name_book(world.store, prefix="")
    world.subscribe("approved", interval="week")
    world.tick()
    hand_over(world, other)
    world.clock.advance(7 * DAY)
    other.tick()
    fence(other)
    take_back(world)
    world.run_for(DAY, step=HOUR)
    assert debits(world)["sub-1-p1"] == 1
    assert world.fate("sub-1-p1") == "open, waiting for a person"
    assert any("belongs to another book: anotherbook" in alert for alert in world.alerts())


@pytest.mark.parametrize(
    ("token", "fate"), [("approved", "open"), ("decline_insufficient_funds", "paid")]
)
def test_a_retry_without_prefix_sells_only_what_the_other_book_was_not_paid_for(
    world, other, token, fate
):
    name_book(world.store, prefix="")
    world.subscribe("approved", interval="week")
    world.tick()
    hand_over(world, other)
    world.clock.advance(7 * DAY)
    give_card(other, token)
    other.tick()
    fence(other)
    take_back(world)
    world.run_for(2 * HOUR, step=HOUR)
    retry_invoice(world.store, world.clock, reference="sub-1-p1", by="operator:ann", why="x")
    world.run_for(DAY, step=HOUR)
    assert debits(world)["sub-1-p1"] == 1
    assert world.fate("sub-1-p1").startswith(fate)


def test_a_cancellation_that_was_made_in_the_other_book_and_is_said_again_is_not_debited(
    world, other
):
    world.subscribe("approved", interval="week")
    world.tick()
    hand_over(world, other)
    world.clock.advance(DAY)
    lifecycle.cancel(other.store, other.clock, "sub-1", at_period_end=True, by="ann")
    decided = world.clock.now()
    world.clock.advance(9 * DAY)
    other.tick()
    fence(other)
    turn_sales(world, on=False)
    take_back(world)
    world.tick()
    lifecycle.cancel(
        world.store, world.clock, "sub-1", at_period_end=True, by="ann", decided_at=decided
    )
    turn_sales(world, on=True)
    world.run_for(DAY, step=HOUR)
    assert debits(world) == {"sub-1-p0": 1}
