"""What is read from a body, and what is refused rather than guessed."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from billing_worker.domain.card_setup import StoredCard
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret
from billing_worker.gateway import answer_bodies, request_bodies
from billing_worker.gateway.port import CheckoutOrder, TokenisationOrder
from tests.gateway.samples import BODIES, GATEWAY_ID, TOKEN, body, exact, invoice

INVOICES = ["04", "06", "08", "09", "17", "19"]


def read(**attributes):
    return answer_bodies.invoice(json.dumps(invoice(**attributes)).encode())


def read_raw(name: str, text: str):
    """An invoice with this attribute written exactly so, for what json.dumps cannot write."""
    content = json.dumps(invoice(**{name: "@"})).replace('"@"', text)
    return answer_bodies.invoice(content.encode())


# --- requests ---


def test_the_tokenisation_request_is_the_one_of_the_seed():
    order = TokenisationOrder(
        reference_id="ORDER1233",
        money=Money.parse("1", "USD"),
        test_mode=True,
        customer_reference_id="my_customer_1",
        customer_name="John Doe",
        description="TEST",
    )
    request = request_bodies.create_request(order, service="payment_card_usd_hpp")
    assert exact(request_bodies.encode(request)) == exact(body("01"))


def test_the_checkout_request_is_the_one_of_the_seed_with_its_callback_inside_the_attributes():
    order = CheckoutOrder(
        reference_id="test_live_recurrent_11",
        money=Money.parse("100", "USD"),
        test_mode=True,
        card_token=Secret("4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x"),
        customer_reference_id="my_customer_1",
        description="Invoice by Token Example",
    )
    request = request_bodies.create_request(
        order, service="payment_card_usd_hpp", callback_url="https://example.com"
    )
    expected = exact(body("03"))
    expected["data"]["attributes"]["callback_url"] = expected["data"].pop("callback_url")
    assert exact(request_bodies.encode(request)) == expected


def test_the_attributes_of_a_sale_are_an_object_and_not_a_list():
    assert request_bodies.encode(request_bodies.sale_request()).endswith(b'"attributes": {}}}')


# --- payment invoices ---


def test_each_example_of_an_invoice_is_among_those_read_here():
    documented = {path.name[:2] for path in BODIES.glob("*.json") if b'"cpi_' in path.read_bytes()}
    assert documented == {*INVOICES, "94"}


@pytest.mark.parametrize("number", INVOICES)
def test_each_example_of_an_invoice_is_read(number):
    printed = exact(body(number))["data"]
    statement = answer_bodies.invoice(body(number))
    assert statement.gateway_id == printed["id"]
    for name in ("status", "resolution", "reference_id", "currency", "test_mode"):
        assert getattr(statement, name) == printed["attributes"][name]
    for name in ("amount", "payment_amount", "processed_amount"):
        assert getattr(statement, name) == printed["attributes"][name]


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1", "1"),
        ("9.99", "9.99"),
        ("0.1", "0.1"),
        ("0", "0"),
        ("1.10", "1.1"),
        ("1e2", "100"),
        ('"100"', "100"),
        ('"9.90"', "9.9"),
        ("999999999.999", "999999999.999"),
        ("0.30000000000000004", "0.30000000000000004"),
    ],
)
def test_an_amount_is_read_exactly(text, amount):
    for name in ("amount", "payment_amount", "processed_amount"):
        assert getattr(read_raw(name, text), name) == Decimal(amount)


@pytest.mark.parametrize(
    "text",
    [
        "true",
        "false",
        "[]",
        "{}",
        '""',
        '"9,99"',
        '"1e2"',
        '" 1"',
        '"1_000"',
        '"NaN"',
        '"Infinity"',
        '"٣"',
        '"0x10"',
        "1e999999999",
        "1e-999999999",
        "0e-999999999",
        "1" * 17,
        "1" * 4000,
        "0." + "1" * 40,
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_an_exact_amount_is_refused(text):
    for name in ("amount", "payment_amount", "processed_amount"):
        with pytest.raises(answer_bodies.UnreadableError, match=name):
            read_raw(name, text)


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1" * 5000, "1e9999999999999999999"]
)
def test_a_number_that_json_or_python_does_not_know_is_refused(text):
    with pytest.raises(answer_bodies.UnreadableError, match="not JSON"):
        read_raw("fee", text)


@pytest.mark.parametrize("value", [2, -1, "true", "false", "1", "", [], {}, 1.0])
def test_a_test_mode_must_be_true_or_false(value):
    with pytest.raises(answer_bodies.UnreadableError, match="test_mode"):
        read(test_mode=value)


@pytest.mark.parametrize("value", [0, 1])
def test_php_writes_one_and_zero_for_true_and_false(value):
    said = read(test_mode=value, moderation_required=value)
    assert (said.test_mode, said.moderation_required) == (bool(value), bool(value))


@pytest.mark.parametrize("value", [2, "yes", []])
def test_held_for_moderation_must_be_true_or_false(value):
    with pytest.raises(answer_bodies.UnreadableError, match="moderation_required"):
        read(moderation_required=value)


@pytest.mark.parametrize(
    "value",
    [None, "", 17, True, [], {}, ["processed"], "a" * 256, "a\x00", "\ud800", "a\nb"],
    ids=repr,
)
def test_a_status_must_be_a_short_text(value):
    with pytest.raises(answer_bodies.UnreadableError, match="status"):
        read(status=value)


@pytest.mark.parametrize("name", ["currency", "reference_id", "resolution"])
@pytest.mark.parametrize("value", [17, True, [], {}, "\x00"], ids=repr)
def test_other_deciding_texts_must_be_texts(name, value):
    with pytest.raises(answer_bodies.UnreadableError, match=name):
        read(**{name: value})


def test_an_unknown_status_is_passed_on_as_it_is():
    assert read(status="reticulated").status == "reticulated"


def test_missing_optional_keys_are_not_made_up():
    statement = answer_bodies.invoice(
        b'{"data": {"id": "cpi_1", "attributes": {"status": "created"}}}'
    )
    assert statement == answer_bodies.Statement(gateway_id="cpi_1", status="created")


@pytest.mark.parametrize("empty", [None, [], {}])
def test_an_empty_object_may_be_written_as_php_does(empty):
    content = invoice(payload=empty, metadata=empty, flow_data=empty, original_data=empty)
    content["data"] |= {"relationships": empty, "links": empty}
    statement = answer_bodies.created_invoice(json.dumps(content).encode())
    assert statement.bearer is None
    assert answer_bodies.stored_card(json.dumps(content).encode()) is None


@pytest.mark.parametrize("empty", [None, [], {}])
def test_the_bearer_may_be_missing_at_each_level(empty):
    assert read(flow_data={"metadata": empty}).bearer is None
    assert read(flow_data={"metadata": {"token": empty}}).bearer is None


@pytest.mark.parametrize("token", [17, True, "", "two words", "a\r\nX-Evil: 1", "é", "a" * 8193])
def test_a_bearer_that_cannot_be_sent_counts_as_none(token):
    assert read(flow_data={"metadata": {"token": token}}).bearer is None


def test_attributes_cannot_pose_as_the_id_or_the_bearer():
    statement = read(id="cpi_other", bearer="other", self_link="/other", flow_data=[])
    assert (statement.gateway_id, statement.bearer) == (GATEWAY_ID, None)


def test_a_byte_order_mark_is_tolerated():
    assert answer_bodies.invoice(b"\xef\xbb\xbf" + body("06")).gateway_id == GATEWAY_ID


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_another_encoding_is_refused(encoding):
    content = '{"data": {"id": "cpi_1", "attributes": {"status": "processed", "note": "é"}}}'
    with pytest.raises(answer_bodies.UnreadableError, match="not JSON"):
        answer_bodies.invoice(content.encode(encoding))


def test_a_key_said_twice_is_refused_wherever_it_is():
    for content in (
        b'{"data": {"id": "cpi_1", "attributes": {"status": "processed", "status": "expired"}}}',
        b'{"data": {"id": "cpi_1", "id": "cpi_2", "attributes": {"status": "processed"}}}',
        b'{"data": {"id": "cpi_1", "attributes": {"status": "created", "x": [{"a": 1, "a": 1}]}}}',
    ):
        with pytest.raises(answer_bodies.UnreadableError, match="not JSON"):
            answer_bodies.invoice(content)


def test_a_fault_is_named_without_its_value():
    with pytest.raises(answer_bodies.UnreadableError) as caught:
        read(amount="4111111111111111 is my card")
    assert str(caught.value) == "amount: not an exact amount"


# --- cards ---


def card_of(payload):
    return answer_bodies.stored_card(json.dumps(invoice(payload=payload)).encode())


def test_the_card_of_the_seed_is_read_with_its_token():
    fragment = exact(body("02"))["payload"]
    assert card_of(fragment) == StoredCard(
        token=Secret("4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x"),
        mask="512381******0000",
        first="512381",
        last="0000",
        holder="John Doe",
        expiry_month=12,
        expiry_year=2032,
        brand="mastercard",
        issuer_name="FIRST DATA CORPORATION",
        issuer_country="US",
    )


def test_the_card_of_a_new_body_is_read_without_a_token():
    card = answer_bodies.stored_card(body("17"))
    assert (card.token, card.brand, card.expiry_month, card.expiry_year) == (
        None,
        "mastercard",
        10,
        2031,
    )


@pytest.mark.parametrize("payload", [None, [], {}, "x", {"token": None}, {"payment_card": []}])
def test_without_a_card_there_is_none(payload):
    assert card_of(payload) is None


def test_a_card_that_makes_no_sense_is_read_as_far_as_it_does():
    payload = {
        "token": TOKEN,
        "payment_card": {"expiry_month": "13", "expiry_year": "soon", "holder": 7, "last": "0000"},
    }
    assert card_of(payload) == StoredCard(token=Secret(TOKEN), last="0000")


@pytest.mark.parametrize(("year", "full"), [("32", 2032), ("2032", 2032), (32, 2032), (0, 2000)])
def test_a_short_year_is_in_this_century(year, full):
    assert card_of({"payment_card": {"expiry_year": year}}).expiry_year == full


def test_a_card_does_not_show_its_token():
    assert TOKEN not in repr(StoredCard(token=Secret(TOKEN)))
