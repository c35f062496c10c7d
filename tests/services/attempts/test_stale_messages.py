"""A message names rows by id, and may be older than the books: after a restore, or a fail-over, or
in a Redis that another book has used. The ids may be those of any other row, or of none.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.persistence.schema import tables
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.subscriptions import lifecycle

ANY_ROW = tuple(range(60))


@pytest.fixture
def books(world):
    """An invoice in each state in which nothing is to be charged now."""
    world.subscribe("approved", "paid")
    world.subscribe("decline_insufficient_funds", "declined")
    world.subscribe("decline_insufficient_funds", "on-a-page")
    world.subscribe("decline_insufficient_funds", "paused")
    world.subscribe("decline_insufficient_funds", "cancelled")
    world.subscribe("pending_forever", "pending")
    world.subscribe(None, "without-a-card")
    world.tick()
    start_checkout(world.ports, {"invoice": "on-a-page-p0"})
    lifecycle.pause(world.store, world.clock, "paused", by="t")
    lifecycle.cancel(world.store, world.clock, "cancelled", at_period_end=False, by="t")
    return world


def state(world):
    with world.store.reading() as connection:
        read = {
            table.name: [
                tuple(row) for row in connection.execute(select(*columns).order_by(table.c.id))
            ]
            for table, columns in COLUMNS.items()
        }
    return read, world.debits()


def columns_of(table, *, but):
    return [column for column in table.c if column.name not in but]


COLUMNS = {
    tables.subscriptions: columns_of(tables.subscriptions, but=()),
    tables.invoices: columns_of(tables.invoices, but=("enqueue_at",)),
    # When the gateway was asked, and is asked next.
    tables.attempts: columns_of(tables.attempts, but=("next_poll_at", "heard_at", "rechecks")),
    tables.cards: columns_of(tables.cards, but=()),
}


@pytest.mark.parametrize("kind", ["charge", "look"])
@pytest.mark.parametrize("later", [timedelta(0), timedelta(minutes=2), timedelta(minutes=20)])
def test_a_message_about_any_row_charges_nothing_that_is_not_due(books, kind, later):
    books.clock.advance(later)
    before = state(books)
    sent = len(books.transport.sent)
    for _ in range(3):
        books.run(kind, ANY_ROW)
        books.run(kind, tuple(reversed(ANY_ROW)))
    assert state(books) == before
    assert {request.method for request in books.transport.sent[sent:]} <= {"GET"}


def test_a_message_about_what_is_due_charges_it_once_however_often_it_comes(world):
    """The row decides, and not the message: this one was about another invoice."""
    for number in range(3):
        world.subscribe("approved", f"sub-{number}")
    world.sweep()
    world.bell.messages.clear()
    for _ in range(3):
        world.run("charge", ANY_ROW)
        world.run("look", ANY_ROW)
    assert set(world.debits().values()) == {1}
    assert len(world.debits()) == 3
