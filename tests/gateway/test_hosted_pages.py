"""What the gateway tells about a payment on its page, and the two requests that open one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_worker.domain.errors import NotSent, OutcomeUnknown, Refused
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret
from billing_worker.gateway import answer_bodies
from billing_worker.gateway.port import CheckoutOrder, TokenisationOrder
from tests.gateway.samples import GATEWAY_ID, Canned, body, canned, exact, invoice, paycore

TOKEN = "4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x"
CARD_PAGE = TokenisationOrder(
    reference_id="ORDER1233", money=Money.parse("1", "USD"), test_mode=True,
    customer_reference_id="my_customer_1", customer_name="John Doe", description="TEST",
)  # fmt: skip
LINK = CheckoutOrder(
    reference_id="test_live_recurrent_11", money=Money.parse("100", "USD"), test_mode=True,
    card_token=Secret(TOKEN), customer_reference_id="my_customer_1",
    description="Invoice by Token Example",
)  # fmt: skip


def sent_by(order, **settings_):
    transport = Canned(201, body("04"))
    paycore("http://gateway.example", transport, **settings_).create_page(order, [])
    return exact(transport.sent[0].body)


def test_a_card_page_is_ordered_as_the_seed_prints_it():
    assert sent_by(CARD_PAGE) == exact(body("01"))


def test_a_pay_link_is_ordered_as_the_seed_prints_it_with_its_callback_among_the_attributes():
    expected = exact(body("03"))
    expected["data"]["attributes"]["callback_url"] = expected["data"].pop("callback_url")
    assert sent_by(LINK, callback_url="https://example.com") == expected


def test_an_order_of_the_other_mode_is_never_sent(calls):
    with pytest.raises(NotSent):
        paycore("http://x.example", Canned(201, body("04")), test_mode=False).create_page(
            LINK, calls
        )
    assert calls == []


def test_the_page_of_the_documented_answer_is_read():
    page = canned(201, body("04")).create_page(LINK, []).page
    assert page.action == "https://cardgate.example.io/hpp/cgi_ZzhRb7xLro7cIf0N"
    assert (page.method, page.params) == ("GET", {})


def test_card_and_customer_of_the_fullest_real_body_are_read():
    said = answer_bodies.invoice_with_page(body("17"))
    assert said.statement.owner.customer == "495901947"
    assert (said.card.mask, said.card.token) == ("512381******0000", None)


def test_a_customer_whom_the_invoice_is_not_linked_to_is_not_taken_for_its_own():
    document = exact(body("17"))
    document["data"]["relationships"]["customer"]["data"]["id"] = "cus_another"
    content = json.dumps(document, default=float).encode()
    assert answer_bodies.invoice_with_page(content).statement.owner.customer is None


def test_an_answer_about_another_invoice_is_no_answer():
    with pytest.raises(OutcomeUnknown, match="another invoice"):
        canned(200, body("04")).poll_page("cpi_other", [])
    with pytest.raises(NotSent):
        canned(200, body("04")).poll_page("../x", [])


def test_a_refusal_is_clear_and_its_call_is_kept_without_the_token(calls):
    with pytest.raises(Refused):
        canned(422, body("93")).create_page(LINK, calls)
    assert TOKEN not in str(calls)
    assert calls[0].operation == "create"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(flow=JSON, payload=JSON, included=JSON, related=JSON)
@settings(max_examples=60, deadline=None)
def test_no_shape_of_page_card_or_customer_raises(flow, payload, included, related):
    document = invoice(flow_data=flow, payload=payload)
    document["included"] = included
    document["data"]["relationships"] = related
    said = answer_bodies.invoice_with_page(json.dumps(document).encode())
    assert said.statement.gateway_id == GATEWAY_ID
    assert said.page is None or said.page.action.startswith("http")
