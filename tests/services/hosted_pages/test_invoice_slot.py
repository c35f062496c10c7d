"""What must wait while a customer is on a page, or a sale is under way: on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select, update

from billing_worker.domain.catch_up_policy import Policy
from billing_worker.persistence import claims
from billing_worker.persistence.schema import tables
from billing_worker.services.dunning import _give_up_one, give_up_overdue
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.invoicing import catch_up
from billing_worker.services.invoicing.catch_up import Answer, Caps
from billing_worker.services.subscriptions import lifecycle
from tests.support.recovery import subscription

pytestmark = pytest.mark.sql

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def waiting(world):
    """An invoice whose customer was waited for long enough an hour ago."""
    world.subscribe("decline_auth_3ds_required")
    world.tick()
    with world.store.transaction() as connection:
        connection.execute(update(tables.invoices).values(give_up_at=world.clock.now() - HOUR))
    return world


def test_recovery_does_not_end_while_the_customer_is_on_a_page(waiting):
    world = waiting
    page = start_checkout(world.ports, {"invoice": "sub-1-p0"})
    with world.store.reading() as connection:  # nor does it take the place of one that has ended
        assert claims.overdue(connection, world.clock.now(), 1) == []
    assert give_up_overdue(world.store, world.clock) == 0
    assert world.sandbox.pay_on_page(page["gateway_id"]).status == 200
    world.run_for(10 * MINUTE, step=MINUTE)
    assert (world.fate(), subscription(world).status) == ("paid", "active")
    assert "subscription.suspended" not in world.events()


def test_a_page_that_is_taken_after_the_sweep_has_found_its_invoice_stops_the_end_too(waiting):
    world = waiting
    with world.store.reading() as connection:
        invoice_id = connection.execute(select(tables.invoices.c.id)).scalar_one()
    start_checkout(world.ports, {"invoice": "sub-1-p0"})
    assert not _give_up_one(world.store, invoice_id, "sub-1", world.clock.now())
    assert world.explain()["status"] == "open"


def test_recovery_ends_once_the_page_has_ended_unpaid(waiting):
    world = waiting
    start_checkout(world.ports, {"invoice": "sub-1-p0"})
    world.run_for(DAY, step=HOUR)
    assert give_up_overdue(world.store, world.clock) == 1
    assert (world.explain()["status"], subscription(world).status) == ("uncollectible", "suspended")


def test_a_held_period_is_not_waived_while_its_customer_is_on_a_page(world):
    world.subscribe(interval="day")
    lifecycle.change(world.store, world.clock, "sub-1", catch_up="hold", by="test")
    world.tick()
    world.clock.advance(3 * DAY + 5 * HOUR)
    world.tick()
    page = start_checkout(world.ports, {"invoice": "sub-1-p1"})
    answer = Answer(Policy.parse("collect_latest"))
    catch_up.apply(world.store, world.clock, answer, Caps(), by="operator:ann", why="outage")
    assert world.explain("sub-1-p1")["status"] == "open"
    assert world.explain("sub-1-p2")["status"] == "void"
    assert world.sandbox.pay_on_page(page["gateway_id"]).status == 200
    world.run_for(10 * MINUTE, step=MINUTE)
    assert world.fate("sub-1-p1") == "paid"
