"""Pages whose payment is made, or begun, before anybody was given the page."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import select, update

from billing_worker.domain.errors import AlreadyPaid, NotPayable, OutcomeUnknown, SlotTaken
from billing_worker.gateway.http import Request, Response
from billing_worker.persistence.schema import tables
from billing_worker.services.hosted_pages import card_setup, pay_link
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.subscriptions import lifecycle
from tests.support.stored_tokens import put_token, token_of

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
INVOICE = "sub-1-p0"
CARD = {"reference_id": "card-1", "customer": {"reference_id": "customer-of-sub-1"}}
SIGN_UP = CARD | {"amount": "1.00", "currency": "USD"}
FOR_INVOICE = CARD | {"invoice": INVOICE}


@pytest.fixture
def declined(world):
    world.subscribe("decline_insufficient_funds.17")
    world.tick()
    assert world.attempts() == ["declined"]
    return world


class Hasty:
    """A gateway that goes on with a payment as soon as its page is created.

    `then`: what it does with the new invoice. `lose`: nothing is answered to that create.
    """

    def __init__(self, world, then, *, lose=False):
        self._world, self._then, self._lose = world, then, lose
        self._send = world.transport.send
        self.creates = 0
        world.transport.send = self.send

    def send(self, request, *, moves_money):
        response = self._send(request, moves_money=moves_money)
        if request.method != "POST" or response.status != 201:
            return response
        self.creates += 1
        gateway_id = json.loads(response.body)["data"]["id"]
        self._then(self._world, gateway_id)
        if self._lose:
            self._lose = False
            raise OutcomeUnknown("connection closed without an answer")
        poll = Request("GET", f"{request.url}/{gateway_id}", request.headers)
        return Response(201, self._send(poll, moves_money=False).body, "application/json")


def is_paid(world, gateway_id):
    assert world.sandbox.pay_on_page(gateway_id).status == 200


def becomes(status, **also):
    def change(world, gateway_id):
        invoice = world.sandbox._books.with_id(gateway_id)
        invoice.status = status
        for name, value in also.items():
            setattr(invoice, name, value)

    return change


def rows(world, table):
    with world.store.reading() as connection:
        return connection.execute(select(table).order_by(table.c.id)).all()


def page(world):
    return rows(world, tables.card_setups)[-1]


def dies(*_args, **_options):
    raise Died


class Died(BaseException):
    """The process is gone: no handler runs."""


@pytest.mark.parametrize("lose", [False, True], ids=["answered", "lost"])
def test_a_link_that_is_paid_at_its_creation_pays_the_invoice_and_says_so(declined, lose):
    hasty = Hasty(declined, is_paid, lose=lose)
    with pytest.raises(AlreadyPaid, match="sub-1-p0 is paid"):
        start_checkout(declined.ports, {"invoice": INVOICE})
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]
    assert declined.explain()["attempts"][1]["gateway_id"] is not None
    with pytest.raises(AlreadyPaid, match="sub-1-p0 is paid"):
        start_checkout(declined.ports, {"invoice": INVOICE})
    assert (hasty.creates, declined.debits()) == (1, {INVOICE: 1})


@pytest.mark.parametrize("lose", [False, True], ids=["answered", "lost"])
def test_a_card_page_that_is_paid_at_its_creation_keeps_the_card_and_says_so(world, lose):
    world.subscribe(None)
    Hasty(world, is_paid, lose=lose)
    with pytest.raises(AlreadyPaid, match="card-1 is paid"):
        start_tokenisation(world.ports, SIGN_UP)
    [card] = rows(world, tables.cards)
    [subscription] = rows(world, tables.subscriptions)
    assert page(world).status == "stored"
    assert page(world).card_id == subscription.card_id == card.id
    with pytest.raises(AlreadyPaid, match="card-1 is paid"):
        start_tokenisation(world.ports, SIGN_UP)
    assert world.debits() == {"card-1": 1}


def test_a_card_page_for_an_invoice_that_is_paid_at_its_creation_settles_both(declined):
    Hasty(declined, is_paid)
    with pytest.raises(AlreadyPaid, match="sub-1-p0 is paid"):
        start_tokenisation(declined.ports, FOR_INVOICE)
    assert declined.fate() == "paid"
    assert page(declined).status == "stored"
    assert declined.debits() == {INVOICE: 1}


@pytest.mark.parametrize("record", [SIGN_UP, FOR_INVOICE], ids=["sign-up", "invoice"])
def test_a_card_page_whose_caller_died_after_a_create_that_was_paid_is_found(
    declined, monkeypatch, record
):
    Hasty(declined, is_paid)
    monkeypatch.setattr(card_setup, "page_to_pay_on", dies)
    with pytest.raises(Died):
        start_tokenisation(declined.ports, record)
    declined.run_for(10 * MINUTE)
    assert page(declined).status == "stored"
    assert declined.fate() == ("paid" if "invoice" in record else "open, next attempt dated")
    assert sum(declined.debits().values()) == 1


def test_a_link_whose_caller_died_after_a_create_that_was_paid_is_found(declined, monkeypatch):
    Hasty(declined, is_paid)
    monkeypatch.setattr(pay_link, "page_to_pay_on", dies)
    with pytest.raises(Died):
        start_checkout(declined.ports, {"invoice": INVOICE})
    declined.run_for(10 * MINUTE)
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]


def test_a_link_is_not_given_back_while_the_gateway_cannot_say_what_was_made_of_it(
    declined, monkeypatch
):
    Hasty(declined, is_paid)
    monkeypatch.setattr(pay_link, "page_to_pay_on", dies)
    with pytest.raises(Died):
        start_checkout(declined.ports, {"invoice": INVOICE})
    declined.transport.unreachable = True
    declined.run_for(2 * HOUR)
    assert declined.attempts() == ["declined", "prepared"]
    declined.transport.unreachable = False
    declined.run_for(10 * MINUTE)
    assert declined.attempts() == ["declined", "succeeded"]


def test_a_link_whose_create_was_paid_and_cannot_be_found_yet_is_found_later(declined):
    """Nobody was given the page, and nobody may call it "not charged" either."""
    hasty = Hasty(declined, is_paid, lose=True)
    declined.transport.before_send = lambda r: setattr(
        declined.transport, "unreachable", r.method == "GET" and hasty.creates > 0
    )
    with pytest.raises(OutcomeUnknown):
        start_checkout(declined.ports, {"invoice": INVOICE})
    assert declined.attempts() == ["declined", "prepared"]
    declined.transport.before_send = lambda _: None
    declined.transport.unreachable = False
    declined.run_for(10 * MINUTE)
    assert declined.fate() == "paid"


@pytest.mark.parametrize(("change", "status"), [("pause", "succeeded"), ("cancel", "surplus")])
def test_a_link_that_a_pause_or_a_cancellation_ended_is_asked_about_too(
    declined, monkeypatch, change, status
):
    Hasty(declined, is_paid)
    monkeypatch.setattr(pay_link, "page_to_pay_on", dies)
    with pytest.raises(Died):
        start_checkout(declined.ports, {"invoice": INVOICE})
    at_once = {"at_period_end": False} if change == "cancel" else {}
    getattr(lifecycle, change)(declined.store, declined.clock, "sub-1", by="t", **at_once)
    assert declined.attempts() == ["declined", "not_charged"]
    declined.run_for(2 * HOUR, step=10 * MINUTE)
    assert declined.attempts() == ["declined", status]
    assert declined.debits() == {INVOICE: 1}


@pytest.mark.parametrize("ask", [start_checkout, start_tokenisation], ids=["link", "card page"])
def test_a_create_that_arrives_after_its_page_was_given_up_is_found(declined, ask):
    """The gateway works on it for an hour, and then it charges."""
    order = []

    def never_answers(request, *, moves_money):
        if request.method == "POST":
            order.append(request)
            raise OutcomeUnknown("read timeout")
        return send(request, moves_money=moves_money)

    send, declined.transport.send = declined.transport.send, never_answers
    with pytest.raises(OutcomeUnknown):
        ask(declined.ports, FOR_INVOICE if ask is start_tokenisation else {"invoice": INVOICE})
    declined.run_for(50 * MINUTE)
    assert declined.attempts() == ["declined", "not_charged"]
    created = json.loads(send(order[0], moves_money=False).body)
    is_paid(declined, created["data"]["id"])
    declined.run_for(2 * HOUR, step=10 * MINUTE)
    assert declined.fate() == "paid"
    if ask is start_tokenisation:
        assert page(declined).status == "stored"


def test_what_never_arrived_is_asked_about_thrice_and_no_more(declined):
    """An hour, a day and three days after its end: then it is forgotten."""
    declined.transport.before_send = lambda r: r.method == "POST" and lost()
    with pytest.raises(OutcomeUnknown):
        start_checkout(declined.ports, {"invoice": INVOICE})
    declined.run_for(10 * MINUTE)
    asked = declined.sandbox.requests.for_reference
    before = asked("find", "sub-1-p0-a2")
    with declined.store.transaction() as connection:
        connection.execute(update(tables.invoices).values(next_attempt_at=None, enqueue_at=None))
    declined.run_for(5 * DAY, step=HOUR)
    assert asked("find", "sub-1-p0-a2") - before == 3
    assert declined.explain()["attempts"][1]["status"] == "not_charged"


def lost():
    raise OutcomeUnknown("read timeout")


def test_a_token_of_a_page_that_was_paid_at_its_creation_is_in_no_event(world):
    world.subscribe(None)
    Hasty(world, is_paid)
    with pytest.raises(AlreadyPaid):
        start_tokenisation(world.ports, SIGN_UP)
    [card] = rows(world, tables.cards)
    token = token_of(world, card)
    assert len(token) > 8
    assert all(token not in json.dumps(event.data) for event in rows(world, tables.events))


BETWEEN = {
    "processing": becomes("processing"),
    "process_error": becomes("process_error"),
    "partly": becomes("partially_processed"),
    "new word": becomes("verified"),
}


@pytest.mark.parametrize("then", [*BETWEEN.values()], ids=[*BETWEEN])
def test_a_link_on_which_money_may_be_moving_is_unknown_and_nothing_else_starts(declined, then):
    before = declined.explain()["next_attempt_at"]
    hasty = Hasty(declined, then)
    with pytest.raises(NotPayable, match="may be paid"):
        start_checkout(declined.ports, {"invoice": INVOICE})
    assert declined.attempts() == ["declined", "submitted"]
    with pytest.raises(SlotTaken):
        start_checkout(declined.ports, {"invoice": INVOICE})
    declined.run_for(5 * DAY, step=HOUR)
    assert declined.attempts() == ["declined", "submitted"]
    becomes("process_pending")(declined, declined.explain()["attempts"][1]["gateway_id"])
    is_paid(declined, declined.explain()["attempts"][1]["gateway_id"])
    declined.run_for(2 * HOUR, step=HOUR)
    assert (declined.fate(), hasty.creates) == ("paid", 1)
    assert before is not None


def test_a_link_that_ends_unpaid_before_it_is_handed_out_keeps_the_next_step_for_three_days(
    declined,
):
    before = declined.explain()
    Hasty(declined, becomes("processing"))
    with pytest.raises(NotPayable):
        start_checkout(declined.ports, {"invoice": INVOICE})
    becomes("expired")(declined, declined.explain()["attempts"][1]["gateway_id"])
    heard_at = declined.clock.now() + 10 * MINUTE
    declined.run_for(2 * HOUR, step=10 * MINUTE)
    assert declined.attempts() == ["declined", "not_charged"]
    after = declined.explain()
    assert after["reason"] == before["reason"]
    assert after["next_attempt_at"] == (heard_at + 3 * DAY).isoformat()


def test_a_card_page_on_which_money_may_be_moving_is_asked_about_until_it_is_decided(world):
    world.subscribe(None)
    Hasty(world, becomes("processing"))
    with pytest.raises(NotPayable, match="may be paid"):
        start_tokenisation(world.ports, SIGN_UP)
    assert (page(world).status, page(world).page) == ("open", None)
    becomes("process_pending")(world, page(world).gateway_id)
    is_paid(world, page(world).gateway_id)
    world.run_for(HOUR, step=MINUTE)
    assert page(world).status == "stored"


def test_an_invoice_that_was_not_handed_out_and_is_paid_all_the_same_is_found(declined):
    """For instance by its moderator, or by whoever guesses its page."""
    Hasty(declined, becomes("process_pending", payment_amount=Decimal(99)))
    with pytest.raises(NotPayable, match="payment_amount"):
        start_checkout(declined.ports, {"invoice": INVOICE})
    assert declined.attempts() == ["declined", "not_charged"]
    gateway_id = declined.explain()["attempts"][1]["gateway_id"]
    invoice = declined.sandbox._books.with_id(gateway_id)
    invoice.payment_amount = invoice.amount
    is_paid(declined, gateway_id)
    declined.run_for(2 * HOUR, step=10 * MINUTE)
    assert declined.fate() == "paid"


def test_a_page_that_is_held_for_moderation_may_be_paid_once_it_is_released(declined):
    put_token(declined, "moderation.17")
    with pytest.raises(NotPayable, match="moderation"):
        start_checkout(declined.ports, {"invoice": INVOICE})
    assert declined.attempts() == ["declined", "submitted"]
