"""A page is for what is owed and not in doubt, for as long as it is so."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from billing_worker.domain.errors import (
    NotPayable,
)
from billing_worker.persistence import callbacks
from billing_worker.persistence.schema import tables
from billing_worker.persistence.switches import turn_sales
from billing_worker.services.hosted_pages.page_address import page_behind
from billing_worker.services.subscriptions import lifecycle
from tests.support.pages import HOUR, INVOICE, MINUTE, checkout, rows, tokenise


def served(world, page):
    name = page["pay_path"].removeprefix("/pay/")
    return page_behind(world.store, world.vault, name) is not None


LINK, CARD_PAGE = pytest.param(checkout, id="link"), pytest.param(
    lambda world: tokenise(world, invoice=INVOICE), id="card page"
)  # fmt: skip


EITHER = pytest.mark.parametrize("ask", [LINK, CARD_PAGE])


def called_back(world, number=1):
    """The gateway calls back about an attempt, and we ask."""
    with world.store.transaction() as connection:
        gateway_id = world.explain()["attempts"][number - 1]["gateway_id"]
        key = callbacks.poll_now(connection, gateway_id, world.clock.now())
    world.run("look", (key.attempt_id,))


def at_gateway(world, number=1):
    (invoice,) = world.sandbox._books.with_reference(f"{INVOICE}-a{number}")
    return invoice


@EITHER
def test_a_page_is_neither_served_nor_given_again_once_an_earlier_charge_has_paid(world, ask):
    world.subscribe("flips_to_processed")
    world.tick()
    page = ask(world)
    world.clock.advance(30)
    called_back(world)
    assert world.fate() == "paid"
    assert not served(world, page)
    with pytest.raises(NotPayable, match="is paid"):
        ask(world)


@EITHER
def test_an_open_page_is_not_served_while_an_earlier_charge_is_undecided_again(declined, ask):
    page = ask(declined)
    assert served(declined, page)
    at_gateway(declined).status = "process_pending"
    called_back(declined)
    assert not served(declined, page)
    with pytest.raises(NotPayable, match="a1 is undecided again"):
        ask(declined)
    at_gateway(declined).status = "process_failed"
    called_back(declined)
    assert served(declined, page)
    assert ask(declined)["action"] == page["action"]


@EITHER
def test_no_page_opens_when_an_earlier_charge_is_undecided_again_while_it_is_created(declined, ask):
    real = declined.transport.send

    def send(request, *, moves_money):
        response = real(request, moves_money=moves_money)
        if request.method == "POST":
            at_gateway(declined).status = "process_pending"
            called_back(declined)
        return response

    declined.transport.send = send
    with pytest.raises(NotPayable, match="a1 is undecided again"):
        ask(declined)
    assert declined.attempts() == ["declined", "not_charged"]


def test_what_is_undecided_again_is_dated_until_it_is_final_or_paid(declined):
    def since():
        return rows(declined, tables.attempts)[0].undecided_since

    assert since() is None
    at_gateway(declined).status = "process_pending"
    called_back(declined)
    first = since()
    assert first == declined.clock.now()
    declined.clock.advance(10 * MINUTE)
    called_back(declined)
    assert since() == first
    at_gateway(declined).status = "expired"
    called_back(declined)
    assert since() is None
    at_gateway(declined).status = "process_pending"
    called_back(declined)
    declined.sandbox._books.acquirer.charge(at_gateway(declined), declined.clock.now())
    called_back(declined)
    assert declined.attempts() == ["succeeded"]
    assert since() is None


@EITHER
def test_no_page_opens_after_a_decline_that_may_have_been_a_payment(world, ask):
    world.subscribe("decline_duplicated_transaction")
    world.tick()
    with pytest.raises(NotPayable, match="a1 may have been paid"):
        ask(world)
    assert world.attempts() == ["declined"]


@EITHER
@pytest.mark.parametrize("change", ["cancelled", "paused", "sales stopped"])
def test_an_open_page_is_not_served_once_its_invoice_may_not_be_collected(declined, ask, change):
    page = ask(declined)
    match change:
        case "cancelled":
            lifecycle.cancel(declined.store, declined.clock, "sub-1", at_period_end=False, by="t")
        case "paused":
            lifecycle.pause(declined.store, declined.clock, "sub-1", by="t")
        case _:
            with declined.store.transaction() as connection:
                now = declined.clock.now()
                turn_sales(connection, on=False, by="t", reason="r", now=now)
    assert not served(declined, page)
    with pytest.raises(NotPayable):
        ask(declined)
    if change == "sales stopped":
        with declined.store.transaction() as connection:
            turn_sales(connection, on=True, by="t", reason="r", now=declined.clock.now())
        assert served(declined, page)


@EITHER
def test_a_page_that_is_refused_leaves_neither_an_attempt_nor_an_alert(declined, ask):
    lifecycle.pause(declined.store, declined.clock, "sub-1", by="t")
    before = len(rows(declined, tables.events))
    for _ in range(3):
        with pytest.raises(NotPayable, match="subscription is paused"):
            ask(declined)
    assert declined.attempts() == ["declined"]
    assert len(rows(declined, tables.events)) == before
    assert rows(declined, tables.card_setups) == []


def test_a_link_whose_card_is_dead_by_now_is_not_given_again(declined):
    checkout(declined)
    with declined.store.transaction() as connection:
        connection.execute(update(tables.cards).values(unusable_reason="lost"))
    with pytest.raises(NotPayable, match="card_unusable: lost"):
        checkout(declined)


@pytest.mark.by_hand
def test_a_link_given_again_is_no_second_try_on_its_card(declined):
    """The last one that a network allows may still be asked for twice."""
    _decline_elsewhere(declined, 8)
    page = checkout(declined)
    assert checkout(declined)["action"] == page["action"]
    _decline_elsewhere(declined, 1)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    with pytest.raises(NotPayable, match="10_declines"):
        checkout(declined)


def _decline_elsewhere(world, count):
    """So many declines of another, void invoice on the Mastercard of the world's first attempt."""
    invoice, attempt = rows(world, tables.invoices)[0], rows(world, tables.attempts)[0]
    so_far = len(rows(world, tables.attempts))
    with world.store.transaction() as connection:
        connection.execute(update(tables.cards).values(brand="mastercard"))
        for n in range(so_far, so_far + count):
            other = {"id": 100 + n, "reference_id": f"other-{n}", "period_number": 100 + n}
            void = {"status": "void", "enqueue_at": None, "next_attempt_at": None}
            connection.execute(tables.invoices.insert(), invoice._asdict() | other | void)
            connection.execute(
                tables.attempts.insert(),
                attempt._asdict()
                | {"id": 100 + n, "reference_id": f"other-{n}-a1", "invoice_id": 100 + n}
                | {"gateway_id": f"cpi_other{n}", "next_poll_at": None},
            )
