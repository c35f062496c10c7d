"""Two books on one gateway account, and invoices of other customers under our reference."""

from __future__ import annotations

import json
import shutil
from contextlib import closing, suppress
from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.errors import InvalidInput, NotPayable, OutcomeUnknown
from billing_worker.gateway.http import Response
from billing_worker.persistence.store import Store
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from tests.support.backup import backup, restore
from tests.support.books import name_book
from tests.support.world import World

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def other(world, sqlite_template, tmp_path):
    """Another brand's book on the account of `world`: the same subscription, another customer."""
    path = tmp_path / "other.db"
    shutil.copy(sqlite_template, path)
    with closing(Store(f"sqlite:///{path}")) as store:
        name_book(store, identity="thebookofanother")
        yield World(store, beside=world)


def one_charged(other, token="approved"):
    other.subscribe(token, customer={"reference_id": "alice"})
    other.tick()
    return other


def refuse_once(world):
    """The next create does not reach the sandbox and its answer says nothing."""

    def cut(request):
        if request.method == "POST" and request.url.endswith("/payment-invoices"):
            world.transport.before_send = lambda _: None
            raise OutcomeUnknown("read timeout")

    world.transport.before_send = cut


# --- without prefixes: two books that are older than prefixes ---------------------------------


def test_an_invoice_of_another_book_that_is_found_is_neither_sold_nor_counted(world, other):
    one_charged(other)
    world.subscribe("approved", customer={"reference_id": "bob"})
    refuse_once(world)
    world.tick()
    world.run_for(2 * HOUR)
    assert world.sandbox.requests.for_reference("sale", "sub-1-p0-a1") == 1
    explained = world.explain()
    assert (explained["status"], explained["next_attempt_at"]) == ("open", None)
    assert explained["attempts"][0]["gateway_id"] is None
    assert "another book" in explained["reason"]
    assert [why for why in world.alerts() if "another book" in why]


@pytest.mark.parametrize("policy", ["return_existing", "409", "422", "429"])
def test_a_create_that_meets_an_invoice_of_another_book_stops_the_charge(world, other, policy):
    one_charged(other, "approved_later")
    world.sandbox.behaviour = replace(world.sandbox.behaviour, duplicate_create=policy)
    world.subscribe("approved", customer={"reference_id": "alice"})
    world.tick()
    world.run_for(3 * HOUR)
    assert world.sandbox.requests.for_reference("sale", "sub-1-p0-a1") == 1
    assert world.explain()["status"] == "open"
    assert world.explain()["next_attempt_at"] is None
    assert any("another book" in why for why in world.alerts())


def test_a_person_orders_the_charge_that_a_foreign_invoice_has_stopped(world, other):
    one_charged(other)
    world.subscribe("approved", customer={"reference_id": "bob"})
    refuse_once(world)
    world.tick()
    world.run_for(HOUR)
    retry_invoice(world.store, world.clock, reference="sub-1-p0", by="operator:ann", why="seen")
    world.run_for(HOUR)
    assert world.attempts() == ["not_charged", "succeeded"]
    assert [(d.reference_id, other.explain()["status"]) for d in world.sandbox.ledger] == [
        ("sub-1-p0-a1", "paid"), ("sub-1-p0-a2", "paid"),
    ]  # fmt: skip


def test_ours_is_believed_when_it_is_paid_beside_a_foreign_one(world, other):
    one_charged(other)
    world.subscribe("never_answers_after", customer={"reference_id": "bob"})
    world.tick()
    world.run_for(HOUR)
    assert world.fate() == "paid"
    assert len(list(world.sandbox.ledger)) == 2


def test_ours_that_is_pending_beside_a_foreign_one_is_not_given_up(world, other):
    """It was sold by the life that the books have forgotten, and the money comes an hour later."""
    world.sandbox.behaviour = replace(world.sandbox.behaviour, later_seconds=3000)
    one_charged(other)
    world.subscribe("approved_later", customer={"reference_id": "bob"})
    kept = backup(world.store)
    world.tick()
    restore(world.store, kept)
    world.run_for(10 * MINUTE)
    with suppress(InvalidInput):
        retry_invoice(world.store, world.clock, reference="sub-1-p0", by="ann", why="asked")
    world.run_for(3 * HOUR)
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"
    assert any("another book" in why for why in world.alerts())


def test_a_card_page_of_another_book_is_not_handed_out(world, other):
    record = {"reference_id": "card-1", "amount": "1.00", "currency": "USD",
              "customer": {"reference_id": "alice"}}  # fmt: skip
    start_tokenisation(other.ports, record)
    world.sandbox.behaviour = replace(world.sandbox.behaviour, duplicate_create="return_existing")
    with pytest.raises(NotPayable, match="another book"):
        start_tokenisation(world.ports, record)


def test_a_pay_link_of_another_book_is_not_handed_out(world, other):
    for book in (other, world):
        book.subscribe("decline_insufficient_funds", customer={"reference_id": "alice"})
        book.tick()
    start_checkout(other.ports, {"invoice": "sub-1-p0"})
    world.sandbox.behaviour = replace(world.sandbox.behaviour, duplicate_create="return_existing")
    with pytest.raises(NotPayable, match="another book"):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})


# --- the customer -----------------------------------------------------------------------------


def without_metadata(world):
    """As labels answer that show none."""

    def reading(send):
        def sent(request, *, moves_money):
            answer = send(request, moves_money=moves_money)
            if not answer.body.startswith(b"{"):
                return answer
            document = json.loads(answer.body)
            data = document.get("data")
            for one in data if isinstance(data, list) else [data]:
                if isinstance(one, dict) and "metadata" in one.get("attributes", {}):
                    one["attributes"]["metadata"] = []
            return Response(answer.status, json.dumps(document).encode(), answer.content_type)

        return sent

    world.transport.send = reading(world.transport.send)
    return world


def test_alices_invoice_is_not_sold_for_bob(world, other):
    without_metadata(world)
    one_charged(other, "pending_forever")
    world.subscribe("approved", customer={"reference_id": "bob"})
    refuse_once(world)
    world.tick()
    world.run_for(3 * HOUR)
    assert world.sandbox.requests.for_reference("sale", "sub-1-p0-a1") == 1
    assert "another customer: alice, expected bob" in world.explain()["reason"]
    assert world.debits() == {}


def test_alices_payment_does_not_count_for_bob(world, other):
    without_metadata(world)
    one_charged(other)
    world.subscribe("approved", customer={"reference_id": "bob"})
    refuse_once(world)
    world.tick()
    world.run_for(3 * HOUR)
    assert world.explain()["status"] == "open"
    assert any("another customer" in why for why in world.alerts())


def test_what_names_neither_book_nor_customer_is_believed_as_before(world):
    without_metadata(world)
    world.subscribe("create_answer_lost")
    world.tick()
    world.run_for(HOUR)
    assert world.fate() == "paid"


# --- prefixes ---------------------------------------------------------------------------------


def test_every_new_reference_carries_the_prefix_of_the_book(world):
    name_book(world.store, prefix="k2m4p6-")
    world.subscribe("approved")
    world.subscribe("decline_insufficient_funds", "sub-2")
    world.tick()
    page = start_checkout(world.ports, {"invoice": "sub-2-p0"})
    card = start_tokenisation(world.ports, {
        "reference_id": "card-1", "amount": "1.00", "currency": "USD",
        "customer": {"reference_id": "customer-of-sub-1"},
    })  # fmt: skip
    assert page["reference_id"] == "k2m4p6-sub-2-p0-a2"
    assert (card["reference_id"], card["gateway_reference"]) == ("card-1", "k2m4p6-card-1")
    sent = [json.loads(r.body)["data"]["attributes"] for r in world.transport.sent if r.body]
    created = [order for order in sent if "reference_id" in order]
    assert [order["reference_id"] for order in created] == [
        "k2m4p6-sub-1-p0-a1", "k2m4p6-sub-2-p0-a1", "k2m4p6-sub-2-p0-a2", "k2m4p6-card-1",
    ]  # fmt: skip
    assert {order["metadata"]["book"] for order in created} == {world.book.identity}


@pytest.mark.parametrize("named", ["sub-1-p0", "sub-1-p0-a1", "k2m4p6-sub-1-p0-a1"])
def test_people_may_leave_the_prefix_out(world, named):
    name_book(world.store, prefix="k2m4p6-")
    world.subscribe("approved")
    world.tick()
    assert world.explain(named)["invoice"] == "sub-1-p0"
    assert world.fate(named) == "paid"


def test_a_caller_s_own_reference_may_poll_like_one_with_the_prefix(world):
    name_book(world.store, prefix="k2m4p6-")
    world.subscribe("approved")
    world.subscribe("approved", "k2m4p6-sub-1")
    world.tick()
    assert world.explain("k2m4p6-sub-1-p0")["subscription"] == "k2m4p6-sub-1"
    assert world.explain("sub-1-p0")["subscription"] == "sub-1"


def test_two_books_with_prefixes_never_meet(world, other):
    name_book(world.store, prefix="k2m4p6-")
    name_book(other.store, prefix="q8r9s7-")
    for book in (world, other):
        book.subscribe("create_answer_lost")
        book.tick()
        book.run_for(HOUR)
    assert (world.fate(), other.fate()) == ("paid", "paid")
    assert world.debits()["sub-1-p0"] == other.debits()["sub-1-p0"] == 1


def test_the_longest_reference_fits_with_the_prefix(world):
    name_book(world.store, prefix="k2m4p6-")
    world.subscribe("approved", "s" * 100, customer={"reference_id": "bob"})
    world.tick()
    assert world.fate("s" * 100 + "-p0") == "paid"
