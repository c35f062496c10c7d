"""Invoices that can never be sold, and answers as PHP writes them."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal

import pytest
import simplejson

from billing_worker.gateway.http import Response
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.hosted_pages.card_setup import start_tokenisation

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def altered(world, change, *, when=lambda _: True):
    """Let `change` rewrite each invoice that the sandbox answers. Returns the mending."""
    send = world.transport.send

    def sent(request, *, moves_money):
        answer = send(request, moves_money=moves_money)
        if moves_money or not when(request):
            return answer
        document = json.loads(answer.body, parse_float=Decimal)
        data = document.get("data")
        for one in data if isinstance(data, list) else [data]:
            if isinstance(one, dict):
                change(one.get("attributes", {}))
        return Response(answer.status, simplejson.dumps(document, use_decimal=True).encode())

    world.transport.send = sent
    return lambda: setattr(world.transport, "send", send)


def without_flow(attributes):
    attributes["flow_data"] = []


def without_token(attributes):
    attributes["flow_data"] = {"metadata": {"sid": "cgi_1"}}


def expired(attributes):
    attributes["status"] = "expired"


def invoices(world):
    """Invoices that the gateway made for sub-1-p0."""
    references = world.sandbox.requests.as_json()["references"]
    return sum(counts["create"] for name, counts in references.items() if name.startswith("sub-1"))


@pytest.mark.parametrize("useless", [without_flow, without_token, expired])
def test_after_three_invoices_that_cannot_be_sold_a_person_is_asked(world, useless):
    mend = altered(world, useless)
    world.subscribe("approved")
    world.run_for(3 * DAY, step=15 * MINUTE)
    assert invoices(world) == 3
    explained = world.explain()
    assert (explained["status"], explained["next_attempt_at"]) == ("open", None)
    assert "instant charges are probably not enabled" in explained["reason"]
    assert any("probably not enabled" in why for why in world.alerts())
    mend()
    retry_invoice(world.store, world.clock, reference="sub-1-p0", by="operator:ann", why="enabled")
    world.run_for(HOUR)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


@pytest.mark.parametrize("useless", [without_flow, expired])
def test_what_only_the_answer_to_the_create_leaves_out_is_read_once_more(world, useless):
    altered(world, useless, when=lambda request: request.method == "POST")
    world.subscribe("approved")
    world.tick()
    assert world.fate() == "paid"
    assert world.sandbox.requests.for_reference("look", "sub-1-p0-a1") == 2


def test_a_retry_while_nothing_is_mended_makes_one_more_invoice_and_stops(world):
    altered(world, without_flow)
    world.subscribe("approved")
    world.run_for(3 * DAY, step=HOUR)
    retry_invoice(world.store, world.clock, reference="sub-1-p0", by="operator:ann", why="hope")
    world.run_for(3 * DAY, step=HOUR)
    assert invoices(world) == 4
    assert world.explain()["next_attempt_at"] is None


# --- floats, and words in another shape -------------------------------------------------------

FLOATS = {
    "9.99": "9.9900000000000002", "19.99": "19.989999999999998", "0.10": "0.10000000000000001",
    "0.07": "0.070000000000000007", "999999999.99": "999999999.99000001",
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), FLOATS.items())
def test_an_amount_that_a_float_has_touched_is_the_same_amount(world, ours, theirs):
    def float_of_php(attributes):
        for name in ("amount", "payment_amount", "processed_amount"):
            if attributes.get(name) is not None:
                attributes[name] = Decimal(theirs)

    altered(world, float_of_php)
    world.subscribe("approved", amount=ours)
    world.tick()
    assert world.fate() == "paid"


@pytest.mark.parametrize("field", ["amount", "payment_amount", "processed_amount"])
@pytest.mark.parametrize("theirs", ["10.00", "9.98", "9.9901", "9.9900001", "9.9899999"])
def test_any_other_amount_is_another_amount(world, field, theirs):
    def differs(attributes):
        if attributes.get(field) is not None:
            attributes[field] = Decimal(theirs)

    altered(world, differs)
    world.subscribe("approved")
    world.run_for(HOUR)
    assert world.fate() != "paid"
    assert any(f"{field} is {theirs}" in why for why in world.alerts())


def test_words_in_another_shape_are_read(world):
    def as_php_writes(attributes):
        attributes["test_mode"] = int(attributes.get("test_mode", True))
        attributes["moderation_required"] = 0
        attributes["currency"] = "usd"
        attributes["resolution"] = ""
        flow = attributes.get("flow_data")
        if flow:
            flow |= {"method": "get", "params": {"a": None, "b": 1}}

    altered(world, as_php_writes)
    world.subscribe("approved")
    page = start_tokenisation(world.ports, {
        "reference_id": "card-1", "amount": "1.00", "currency": "USD",
        "customer": {"reference_id": "customer-of-sub-1"},
    })  # fmt: skip
    world.tick()
    assert world.fate() == "paid"
    assert (page["method"], page["params"]) == ("GET", {"b": "1"})


def test_a_live_invoice_is_still_not_a_test(world):
    altered(world, lambda attributes: attributes.update(test_mode=0))
    world.subscribe("approved")
    world.run_for(HOUR)
    assert world.debits() == {}
