"""A page on which a customer pays so that the card is stored."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import update

from billing_worker.domain.card_setup import PageStatement
from billing_worker.domain.errors import (
    GatewayError,
    InvalidInput,
    NotPayable,
    OutcomeUnknown,
    SlotTaken,
)
from billing_worker.gateway.http import Response
from billing_worker.persistence.schema import tables
from billing_worker.services.hosted_pages import card_setup
from billing_worker.services.hosted_pages.records import parse_checkout, parse_tokenisation
from billing_worker.services.import_records.subscription import BadRecord
from tests.support.pages import (
    DAY,
    HOUR,
    INVOICE,
    MINUTE,
    Died,
    answering,
    checkout,
    dies_after,
    late_money_is_over,
    late_payment,
    overtaken,
    pay,
    payment,
    rows,
    sent,
    tokenise,
    told,
)
from tests.support.stored_tokens import token_of


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({}, "invoice"),
        ({"invoice": 1}, "invoice"),
        ({"invoice": INVOICE, "return_url": "ftp://x"}, "return_url"),
        ({"invoice": INVOICE, "amount": "1"}, "amount"),
    ],
)
def test_a_bad_record_of_a_link_names_its_field(record, field):
    with pytest.raises(BadRecord) as caught:
        parse_checkout(record)
    assert field in {fault.field for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"reference_id": None}, "reference_id"),
        ({"customer": {}}, "customer.reference_id"),
        ({"amount": 1.0}, "amount"),
        ({"amount": None}, "amount"),
        ({"currency": "usd"}, "currency"),
        ({"return_url": "javascript:1"}, "return_url"),
        # A charge that looks itself up by its reference would find this page's payment.
        ({"reference_id": "sub-1-p0-a1"}, "reference_id"),
    ],
)
def test_a_bad_record_of_a_card_page_names_its_field(change, field):
    record = {"reference_id": "card-1", "customer": {"reference_id": "c"}, "amount": "1.00",
              "currency": "USD", **change}  # fmt: skip
    with pytest.raises(BadRecord) as caught:
        parse_tokenisation(record)
    assert field in {fault.field for fault in caught.value.faults}


def test_a_paid_card_page_stores_the_card_with_all_that_the_gateway_tells(world):
    pay(world, tokenise(world))
    world.run_for(MINUTE, step=timedelta(seconds=15))
    (card,) = rows(world, tables.cards)
    assert payment(world).status == "stored"
    assert payment(world).card_id == card.id
    assert (card.mask, card.brand, card.holder) == ("512381******0000", "mastercard", "JANE DOE")
    assert (card.expiry_month, card.expiry_year) == (12, 2032)
    assert (card.issuer_name, card.issuer_country) == ("FIRST DATA CORPORATION", "US")
    assert token_of(world, card).startswith("approved.minted")


def test_the_order_of_a_card_page_is_the_one_of_the_seed(world):
    tokenise(world, description="TEST")
    assert sent(world)[-1]["data"]["attributes"] == {
        "test_mode": True, "reference_id": "card-1", "description": "TEST", "currency": "USD",
        "amount": 1, "customer": {"reference_id": "customer-of-sub-1"},
        "service": "payment_card_usd_hpp", "gateway_options": {"cardgate": {"tokenize": True}},
        "metadata": {"book": world.book.identity, "create": "create-1"},
    }  # fmt: skip


def test_a_stored_card_pays_what_its_customer_owes_from_then_on(world):
    world.subscribe(None)
    world.tick()
    assert world.explain()["reason"] == "card_missing"
    pay(world, tokenise(world))
    world.run_for(10 * MINUTE)
    assert world.fate() == "paid"
    assert world.debits() == {"card-1": 1, INVOICE: 1}


def test_a_subscription_with_a_good_card_keeps_it(world):
    world.subscribe("approved")
    pay(world, tokenise(world))
    world.run_for(10 * MINUTE)
    assert payment(world).status == "stored"
    assert rows(world, tables.subscriptions)[0].card_id == 1


def test_polling_again_and_again_stores_the_card_once(world):
    page = tokenise(world)
    pay(world, page)
    for _ in range(3):
        world.run_for(MINUTE, step=timedelta(seconds=20))
        with world.store.transaction() as connection:
            connection.execute(update(tables.card_setups).values(next_poll_at=world.clock.now()))
    world.tick()
    assert len(rows(world, tables.cards)) == 1
    assert len(told(world, "card.stored")) == 1
    assert payment(world).next_poll_at is None


def test_the_first_payment_is_booked_to_the_invoice_it_names(declined):
    page = tokenise(declined, invoice=INVOICE)
    assert page["gateway_reference"] == "sub-1-p0-a2"
    assert (page["amount"], page["invoice"]) == ("9.99", INVOICE)
    pay(declined, page)
    declined.run_for(5 * MINUTE)
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]
    assert declined.debits() == {INVOICE: 1}
    assert payment(declined).status == "stored"


def test_a_card_page_for_an_invoice_takes_its_one_slot(declined):
    tokenise(declined, invoice=INVOICE)
    with pytest.raises(SlotTaken):
        checkout(declined)
    with pytest.raises(SlotTaken):
        tokenise(declined, "card-2", invoice=INVOICE)
    declined.run_for(50 * MINUTE, step=5 * MINUTE)
    assert declined.attempts() == ["declined", "submitted"]


def test_a_card_page_that_nobody_pays_gives_the_invoice_back(declined):
    before = declined.explain()["next_attempt_at"]
    tokenise(declined, invoice=INVOICE)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    assert declined.attempts() == ["declined", "not_charged"]
    assert declined.explain()["next_attempt_at"] == late_money_is_over(declined) > before
    assert (payment(declined).status, payment(declined).outcome) == ("unpaid", "expired")


def test_a_card_page_for_somebody_elses_invoice_or_another_amount_is_refused(declined):
    with pytest.raises(InvalidInput, match="another customer"):
        tokenise(declined, customer="stranger", invoice=INVOICE)
    with pytest.raises(InvalidInput, match=r"asks for 9\.99"):
        tokenise(declined, invoice=INVOICE, amount="1.00", currency="USD")


def test_the_same_reference_is_the_same_page_and_other_contents_are_a_conflict(world):
    first = tokenise(world)
    assert tokenise(world)["action"] == first["action"]
    assert world.sandbox.requests.total("create") == 1
    with pytest.raises(InvalidInput, match="other contents"):
        tokenise(world, description="another")


@pytest.mark.parametrize("answer", ["lost", "error"])
def test_a_card_page_whose_create_got_no_answer_is_polled_for_before_it_is_repeated(world, answer):
    real = world.transport.send

    def once(request, *, moves_money):
        if request.method == "POST":
            world.transport.send = real
            if answer == "lost":
                real(request, moves_money=moves_money)
            raise OutcomeUnknown("connection closed")
        raise OutcomeUnknown("gateway away")

    world.transport.send = once
    if answer == "lost":
        tokenise(world)
        assert world.sandbox.requests.for_reference("create", "card-1") == 1
        return
    with pytest.raises(OutcomeUnknown):
        tokenise(world)
    tokenise(world)
    assert world.sandbox.requests.for_reference("create", "card-1") == 1
    assert payment(world).status == "open"


def test_of_two_callers_for_one_card_page_only_the_newer_hands_it_out(world, monkeypatch):
    page = overtaken(monkeypatch, card_setup, lambda: tokenise(world))
    assert payment(world).gateway_id == page["gateway_id"]


def test_a_card_page_for_an_invoice_is_continued_by_its_reference(declined):
    dies_after(declined, 1)
    with pytest.raises(Died):
        tokenise(declined, invoice=INVOICE)
    declined.transport.before_send = lambda _: None
    page = tokenise(declined, invoice=INVOICE)
    assert page["gateway_reference"] == "sub-1-p0-a2"
    assert declined.attempts() == ["declined", "submitted"]


def test_a_card_page_that_the_gateway_refuses_is_used_up_and_gives_the_invoice_back(declined):
    real = declined.transport.send

    def refuse(request, *, moves_money):
        if request.method == "POST":
            body = b'{"errors":[{"title":"Unprocessable Content","status":"422"}]}'
            return Response(422, body, "application/json")
        return real(request, moves_money=moves_money)

    declined.transport.send = refuse
    with pytest.raises(GatewayError, match="422"):
        tokenise(declined, invoice=INVOICE)
    assert declined.attempts() == ["declined", "not_charged"]
    assert payment(declined).outcome.startswith("gateway refused the page")


def test_a_card_page_that_its_caller_never_handed_out_is_given_up(world):
    dies_after(world, 0)
    with pytest.raises(Died):
        tokenise(world)
    world.transport.before_send = lambda _: None
    world.run_for(10 * MINUTE, step=MINUTE)
    assert (payment(world).status, payment(world).outcome) == ("unpaid", "never_handed_out")
    with pytest.raises(NotPayable, match="use a new reference_id"):
        tokenise(world)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
@pytest.mark.parametrize("payload", [None, [], {"token": None}, {"payment_card": {"mask": "5*1"}}])
def test_a_paid_page_without_a_token_has_a_typed_reason_and_is_asked_about_for_a_month(
    world, payload
):
    page = tokenise(world)
    answering(world, lambda attributes: attributes.update(payload=payload))
    pay(world, page)
    world.run_for(MINUTE, step=timedelta(seconds=15))
    assert (payment(world).status, payment(world).outcome) == ("no_card", "token_missing")
    (event,) = told(world, "card.not_stored")
    assert event.alert
    assert event.data["needs"] == "the customer enters the card once more, on a new page"
    polls = world.sandbox.requests.total("look")
    world.run_for(40 * DAY, step=6 * HOUR)
    assert world.sandbox.requests.total("look") == polls + 5
    assert payment(world).next_poll_at is None
    assert len(told(world, "card.not_stored")) == 1


def test_a_token_that_is_minted_after_the_first_poll_still_stores_the_card(world):
    page = tokenise(world)
    late = [True]
    answering(world, lambda a: a.update(payload=None) if late[0] else None)
    pay(world, page)
    world.run_for(MINUTE, step=timedelta(seconds=15))
    assert payment(world).status == "no_card"
    late[0] = False
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert payment(world).status == "stored"
    assert len(rows(world, tables.cards)) == 1


def test_a_token_that_the_gateway_links_to_another_customer_is_not_stored(world):
    page = tokenise(world)

    def somebody_else(included):
        for resource in included:
            resource["attributes"]["reference_id"] = "somebody-else"
        return included

    answering(world, lambda _: None, with_included=somebody_else)
    pay(world, page)
    world.run_for(HOUR, step=10 * MINUTE)
    assert payment(world).outcome == "token_of_another_customer"
    assert rows(world, tables.cards) == []
    assert told(world, "card.not_stored")[0].alert


def test_a_token_that_is_stored_for_another_customer_is_not_stored_again(world):
    pay(world, tokenise(world, "card-1", "customer-1"))
    world.run_for(MINUTE, step=timedelta(seconds=15))
    (card,) = rows(world, tables.cards)
    token = token_of(world, card)
    page = tokenise(world, "card-2", "customer-2")
    pay(world, page)
    answering(world, lambda attributes: attributes["payload"].update(token=token))
    world.run_for(HOUR, step=10 * MINUTE)
    assert payment(world).outcome == "token_of_another_customer"
    assert len(rows(world, tables.cards)) == 1


def test_a_card_page_that_is_paid_late_still_stores_the_card(world):
    page = tokenise(world)
    world.run_for(2.5 * HOUR, step=15 * MINUTE)
    assert payment(world).status == "unpaid"
    invoice = world.sandbox._books.with_id(page["gateway_id"])
    world.sandbox._books.mint_token(invoice)
    late_payment(world, page)
    world.run_for(1.5 * HOUR, step=5 * MINUTE)
    assert payment(world).status == "stored"


def test_a_page_paid_with_another_amount_stores_nothing_and_alerts_once(world):
    page = tokenise(world)
    pay(world, page)
    answering(world, lambda attributes: attributes.update(amount=2))
    world.run_for(2 * HOUR, step=15 * MINUTE)
    assert payment(world).status == "open"
    assert rows(world, tables.cards) == []
    assert [e.alert for e in told(world, "card_page.looked")] == [True]


def test_no_secret_of_a_page_can_be_printed_by_accident(world):
    said = world.ports.gateway.poll_page(tokenise(world)["gateway_id"], [])
    assert isinstance(said, PageStatement)
    assert "hpp/" not in repr(said)


def test_the_address_of_a_page_and_what_it_submits_are_in_no_event(declined):
    """Whoever reads the history must not be able to pay, or to take a page over."""

    def post(attributes):
        attributes["flow_data"]["params"] = {"one": "sesame} open", "two": "abracadabra"}
        attributes["flow_data"]["method"] = "POST"

    answering(declined, post)
    page = checkout(declined)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    assert page["params"] == {"one": "sesame} open", "two": "abracadabra"}
    tokenise(declined)
    written = json.dumps([event.data for event in rows(declined, tables.events)])
    assert "abracadabra" not in written
    assert "sesame" not in written
    assert page["action"].rpartition("/")[2] not in written
    assert "/hpp/" not in written.replace("\\", "")
