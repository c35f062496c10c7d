"""What tests of a subscription's life do to a world, and look for in it."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select

from billing_worker.domain.secret import Secret
from billing_worker.persistence import subscriptions as stored
from billing_worker.persistence.rows import subscription_from
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.import_records.subscription import (
    CardRecord,
)
from billing_worker.services.subscriptions import lifecycle

DAY = timedelta(days=1)
ANN = {"by": "operator:ann", "why": "asked by phone"}


def do(world, what, reference="sub-1", **options):
    return getattr(lifecycle, what)(world.store, world.clock, reference, **(ANN | options))


def row(world, reference="sub-1"):
    with world.store.reading() as connection:
        return stored.find(connection, reference)


def invoices(world, reference="sub-1"):
    query = (
        select(tables.invoices)
        .join(tables.subscriptions)
        .where(tables.subscriptions.c.reference_id == reference)
        .order_by(tables.invoices.c.period_number)
    )
    with world.store.reading() as connection:
        return connection.execute(query).all()


def history(world, reference="sub-1"):
    query = select(tables.events).where(tables.events.c.subscription_id == row(world, reference).id)
    with world.store.reading() as connection:
        return connection.execute(query.order_by(tables.events.c.id)).all()


def next_dates(world, count):
    """The local days of the next periods, without billing them."""
    with world.store.reading() as connection:
        subscription = subscription_from(stored.find(connection, "sub-1"))
    numbers = range(subscription.next_period, subscription.next_period + count)
    return [f"{subscription.start_of(number):%d %b %Y}" for number in numbers]


def suspend(world, **terms):
    world.subscribe("decline_insufficient_funds", **terms)
    for _ in range(40):
        world.tick()
        if row(world).status == "suspended":
            return
        world.clock.advance(DAY)
    raise AssertionError("the ladder has no end")


def give_card(world, token="approved", reference="sub-1", **options):
    card = CardRecord(Secret(f"{token}.{reference}"), None, None, 12, 2040)
    return replace_card(world.store, world.vault, world.clock, subscription_reference=reference,
                        card=card, **(ANN | options))  # fmt: skip
