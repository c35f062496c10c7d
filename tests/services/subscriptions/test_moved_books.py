"""A subscription that moved here while the book it comes from goes on charging all the same."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.errors import NotPayable
from billing_worker.persistence.store import Store
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions import activate_imports
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.books import name_book
from tests.support.world import START, World

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
FORMER = "thebookofanother"
JO = {"reference_id": "jo"}


@pytest.fixture
def world(store):
    """Not compared with the ledger afterwards: the other book charges there too."""
    return World(store)


@pytest.fixture
def other(world, sqlite_template, tmp_path):
    """The book that has billed it before, on the same account."""
    path = tmp_path / "other.db"
    shutil.copy(sqlite_template, path)
    with closing(Store(f"sqlite:///{path}")) as store:
        name_book(store, identity=FORMER)
        yield World(store, beside=world)


def run_both(world, other, span, step=5 * MINUTE):
    end = world.clock.now() + span
    while world.clock.now() < end:
        other.tick()
        world.tick()
        world.clock.advance(step)


def test_a_pay_link_that_met_the_former_book_s_sale_leads_to_no_second_one(world, other):
    world.sandbox.behaviour = replace(
        world.sandbox.behaviour, later_seconds=5 * 3600, lifetime_seconds=86400
    )
    other.subscribe("approved_later", customer=JO, ends_after_periods=1)
    world.subscribe(
        "approved_later", customer=JO, ends_after_periods=1, from_book=FORMER, from_prefix=""
    )
    other.tick()
    world.sweep()
    with pytest.raises(NotPayable, match="moved ones"):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})
    run_both(world, other, 8 * HOUR)
    assert world.debits(everybody=True) == {"sub-1-p0": 1}
    assert world.fate() == "paid"


def test_what_the_former_book_charged_while_an_import_was_held_is_found(world, other):
    other.subscribe("approved", customer=JO, interval="week")
    other.tick()
    record = {
        "reference_id": "sub-1", "customer": JO, "card": {"token": "approved.jo"},
        "amount": "9.99", "currency": "USD", "interval": "week", "anchor_at": START.isoformat(),
        "paid_through": (START + 7 * DAY).isoformat(), "from_book": FORMER, "from_prefix": "",
    }  # fmt: skip
    subscribe(world.store, world.vault, world.clock, [parse_record(record)], by="test", held=True)
    for _ in range(3):
        world.clock.advance(7 * DAY)
        other.tick()
    activate_imports.activate_all(world.store, world.clock, by="ann")
    world.run_for(3 * HOUR, step=15 * MINUTE)
    assert set(world.debits(everybody=True).values()) == {1}
