"""What a process is in the middle of when the database forgets its last commits."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import ConcurrentChange, NotPayable, Refused
from billing_worker.domain.outcome import NoAnswer
from billing_worker.persistence import switches
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.schema.tables import attempts, events, invoices
from billing_worker.services.attempts import commit
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.charge import charge_batch
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.invoicing.renew import renew_due
from tests.support.backup import backup, restore

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def test_a_page_that_is_forgotten_after_it_was_handed_out_is_not_charged_again(world):
    world.subscribe("approved")
    renew_due(world.ports)
    kept = backup(world.store)
    page = start_checkout(world.ports, {"invoice": "sub-1-p0"})
    restore(world.store, kept)
    world.sandbox.pay_on_page(page["gateway_id"])
    world.run_for(2 * DAY, step=timedelta(minutes=30))
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"
    with world.store.reading() as connection:
        told = connection.execute(select(events.c.alert).where(events.c.kind == "book.forgot"))
        assert told.scalars().all() == [True]


def _link(world):
    return start_checkout(world.ports, {"invoice": "sub-1-p0"})


def _card_page(world):
    return start_tokenisation(world.ports, {
        "reference_id": "card-1", "customer": {"reference_id": "customer-of-sub-1"},
        "invoice": "sub-1-p0", "return_url": "https://shop.example/done",
    })  # fmt: skip


@pytest.mark.parametrize("ask", [_link, _card_page])
def test_a_page_is_not_opened_beside_a_charge_that_the_books_have_just_forgotten(world, ask):
    """No sweep has noticed the loss yet: the caller is the first who can."""
    world.subscribe("html_502_after")
    renew_due(world.ports)
    kept = backup(world.store)
    charge_batch(world.ports, [1])
    restore(world.store, kept)
    with pytest.raises(NotPayable):
        ask(world)
    world.run_for(2 * DAY, step=timedelta(minutes=30))
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"


def test_a_page_whose_row_is_forgotten_is_not_handed_out(world):
    world.subscribe("approved")
    renew_due(world.ports)
    kept = backup(world.store)

    def forget(request):
        if request.method == "POST":
            world.transport.before_send = lambda _: None
            restore(world.store, kept)

    world.transport.before_send = forget
    with pytest.raises(ConcurrentChange, match="not in the books any more"):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})


def test_a_card_page_whose_row_is_forgotten_is_not_handed_out(world):
    kept = backup(world.store)

    def forget(request):
        if request.method == "POST":
            world.transport.before_send = lambda _: None
            restore(world.store, kept)
            raise Refused("no such currency", http_status=422)

    world.transport.before_send = forget
    with pytest.raises(ConcurrentChange, match="not in the books any more"):
        start_tokenisation(world.ports, {
            "reference_id": "card-1", "customer": {"reference_id": "ann"}, "amount": "1.00",
            "currency": "USD",
        })  # fmt: skip


def test_a_row_that_is_forgotten_costs_its_neighbours_nothing(world):
    world.subscribe("never_answers_after")
    world.tick()
    with world.store.reading() as connection:
        row = connection.execute(select(attempts.c.id, invoices.c.id.label("invoice_id"),
                                        invoices.c.subscription_id).join(invoices)).one()  # fmt: skip
    known = CaseKey(row.subscription_id, row.invoice_id, row.id)
    gone = CaseKey(row.subscription_id, row.invoice_id, row.id + 1)
    asked = [Settle(key, NoAnswer("read timeout"), "test") for key in (gone, known)]
    forgotten, settled = commit._commit(world.ports, asked)
    assert forgotten is None
    assert settled.case.attempt.reference_id == "sub-1-p0-a1"


def test_a_sweep_notices_the_loss_before_anything_is_due(world):
    world.subscribe("approved")
    kept = backup(world.store)
    world.tick()
    restore(world.store, kept)
    renew_due(world.ports)
    with world.store.reading() as connection:
        assert switches.read(connection).restored_at == world.clock.now()
    world.run_for(HOUR)
    assert world.debits() == {"sub-1-p0": 1}
