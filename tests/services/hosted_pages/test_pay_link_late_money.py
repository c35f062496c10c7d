"""Money that comes by a page, or by an earlier charge, after the customer was given up."""

from __future__ import annotations

from itertools import permutations

import pytest
from sqlalchemy import update

from billing_worker.domain.errors import (
    GatewayError,
    NotPayable,
)
from billing_worker.persistence.schema import tables
from tests.support.pages import (
    DAY,
    HOUR,
    INVOICE,
    MINUTE,
    checkout,
    give_card,
    late_payment,
    pay,
    told,
)


def test_a_stale_page_that_is_paid_late_pays_the_invoice_if_it_is_still_owed(declined):
    page = checkout(declined)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    late_payment(declined, page)
    declined.run_for(1.5 * HOUR, step=5 * MINUTE)
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]


def test_late_money_is_found_before_a_retry_and_the_retry_is_not_made(declined):
    page = checkout(declined)
    # The last recheck before the retry is a day after the page's end; the money comes after it.
    declined.run_for(1.5 * DAY, step=30 * MINUTE)
    late_payment(declined, page)
    declined.run_for(5 * DAY, step=6 * HOUR)
    assert declined.fate() == "paid"
    assert declined.debits() == {INVOICE: 1}


def test_a_stale_page_that_is_paid_after_a_retry_was_is_surplus_and_a_person_is_told(declined):
    page = checkout(declined)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    _let_the_card_pay(declined)
    declined.run_for(3.5 * DAY, step=3 * HOUR)
    assert declined.fate() == "paid"
    late_payment(declined, page)
    declined.run_for(5 * DAY, step=6 * HOUR)
    statuses = declined.attempts()
    assert statuses == ["declined", "surplus", "succeeded"]
    assert [e.alert for e in told(declined, "attempt.surplus")] == [True]


def _let_the_card_pay(world):
    give_card(world, "approved.17")


def test_an_earlier_charge_that_flips_to_paid_refuses_the_link(world):
    world.subscribe("flips_to_processed")
    world.tick()
    world.clock.advance(20)
    with pytest.raises(NotPayable, match="turned out paid"):
        checkout(world)
    assert world.fate() == "paid"
    assert world.debits() == {INVOICE: 1}


def test_an_earlier_charge_that_is_pending_again_refuses_the_link(declined):
    invoice = declined.sandbox._books.with_reference("sub-1-p0-a1")[0]
    invoice.status = "process_pending"
    with pytest.raises(NotPayable, match="undecided again"):
        checkout(declined)
    assert declined.attempts()[-1] == "not_charged"


def test_a_link_whose_create_was_lost_does_not_keep_the_customer_from_the_next_one(declined):
    def lose_the_answer(request):
        if request.method == "POST":
            declined.transport.before_send = lambda _: declined.transport.__dict__.update(
                unreachable=True
            )

    declined.transport.before_send = lose_the_answer
    give_card(declined, "create_answer_lost")
    with pytest.raises(GatewayError):
        checkout(declined)
    declined.transport.before_send = lambda _: None
    declined.transport.unreachable = False
    [lost] = declined.sandbox._books.with_reference("sub-1-p0-a2")
    assert lost.is_open
    pay(declined, checkout(declined))
    declined.run_for(5 * MINUTE)
    assert declined.attempts() == ["declined", "succeeded"]
    assert len(declined.sandbox._books.with_reference("sub-1-p0-a2")) == 1


def test_an_earlier_charge_that_cannot_be_asked_about_refuses_the_link(declined):
    declined.transport.unreachable = True
    with pytest.raises(GatewayError):
        checkout(declined)
    assert declined.attempts() == ["declined", "not_charged"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
@pytest.mark.parametrize("order", [*permutations(["link", "pay", "retry", "expire"])], ids="-".join)
def test_no_order_of_link_retry_and_late_payment_pays_an_invoice_twice_unnoticed(declined, order):
    world = declined
    _let_the_card_pay(world)
    page = None
    for event in order:
        match event:
            case "link":
                try:
                    page = checkout(world)
                except NotPayable:
                    page = None
            case "pay" if page:
                invoice = world.sandbox._books.with_id(page["gateway_id"])
                if invoice.is_open or invoice.status == "expired":
                    late_payment(world, page)
            case "retry":
                with world.store.transaction() as connection:
                    now = world.clock.now()
                    connection.execute(
                        update(tables.invoices)
                        .where(tables.invoices.c.status == "open")
                        .values(next_attempt_at=now, enqueue_at=now, next_origin="manual")
                    )
                world.run_for(2 * MINUTE)
            case "expire":
                world.run_for(2.5 * HOUR, step=30 * MINUTE)
    world.run_for(4 * DAY, step=8 * HOUR)
    debits = world.debits()[INVOICE]
    statuses = world.attempts()
    assert statuses.count("succeeded") == min(debits, 1)
    assert statuses.count("surplus") == max(debits - 1, 0)
    assert len(told(world, "attempt.surplus")) == max(debits - 1, 0)
