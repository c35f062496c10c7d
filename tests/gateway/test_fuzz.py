"""Whatever the gateway answers, the client ends in one of three errors or in typed values."""

from __future__ import annotations

import json
from dataclasses import fields
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_worker.domain.card_setup import StoredCard
from billing_worker.domain.errors import NotSent, OutcomeUnknown, Refused
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import SaleAnswer, Statement
from billing_worker.gateway.answer_bodies import UnreadableError, stored_card
from billing_worker.gateway.port import CallLog
from tests.gateway.samples import BEARER, GATEWAY_ID, canned, invoice, order

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "processed", "9.99", "NaN", "cpi_1", "\x00", "1e999999", GATEWAY_ID])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
dates = st.integers(0, 2200)
cards = st.dictionaries(
    st.sampled_from([*(one.name for one in fields(StoredCard)), "network"]),
    values | dates | dates.map(str),
)
payloads = st.fixed_dictionaries({"payment_card": cards}, optional={"token": values})
NAMES = [*invoice()["data"]["attributes"], "errors", "error", "auth_payload"]
attributes = st.dictionaries(st.sampled_from(NAMES), values, max_size=6)
statuses = st.sampled_from([200, 201, 204, 400, 401, 404, 409, 422, 429, 500, 502, 103, 999])


@st.composite
def nearly_invoices(draw):
    """The documented answer with a few values replaced, at any of its levels."""
    content = invoice(**draw(attributes))
    if draw(st.booleans()):
        content["data"] |= draw(
            st.dictionaries(st.sampled_from(["id", "type", "links", "attributes"]), values)
        )
    if draw(st.booleans()):
        content |= draw(st.dictionaries(st.sampled_from(["data", "errors", "error"]), values))
    return content


@st.composite
def bodies(draw):
    content = draw(nearly_invoices() | attributes | values)
    if draw(st.booleans()):
        content = {"data": [content.get("data")]} if isinstance(content, dict) else content
    encoded = json.dumps(content).encode()
    cut = draw(st.integers(0, 9))
    return encoded[: len(encoded) // 2] if cut == 0 else encoded


answers = st.one_of(bodies(), bodies(), bodies(), st.binary(max_size=200))


def check_statement(statement: object) -> None:
    assert type(statement) is Statement
    assert type(statement.gateway_id) is str
    assert statement.gateway_id
    assert type(statement.status) is str
    assert statement.status
    for text in (statement.resolution, statement.reference_id, statement.currency):
        assert text is None or (type(text) is str and text.isprintable())
    for amount in (statement.amount, statement.payment_amount, statement.processed_amount):
        assert amount is None or (type(amount) is Decimal and amount.is_finite())
    assert statement.test_mode in {None, True, False}
    assert type(statement.moderation_required) is bool
    assert statement.bearer is None or type(statement.bearer) is Secret


def check_card(card: object) -> None:
    assert type(card) is StoredCard
    said = {one.name: getattr(card, one.name) for one in fields(card)}
    assert any(said.values())
    token, month, year = (said.pop(name) for name in ("token", "expiry_month", "expiry_year"))
    assert token is None or type(token) is Secret
    assert month is None or (type(month) is int and 1 <= month <= 12)
    assert year is None or (type(year) is int and 2000 <= year <= 2100)
    for text in said.values():
        assert text is None or (type(text) is str and 0 < len(text) <= 255 and text.isprintable())


def ask(verb, status: int, content: bytes):
    """The result of a verb, or None for one of the three errors; one logged call either way."""
    calls: CallLog = []
    result, error = None, None
    try:
        result = verb(canned(status, content), calls)
    except (NotSent, Refused, OutcomeUnknown) as raised:
        error = raised
    check_error(error, status)
    # Only a search is repeated, without its slash.
    assert len(calls) == 1 or status == 404
    for call in calls:
        check_call(call)
    return result


def check_error(error, status: int) -> None:
    assert type(error) is not Refused or 400 <= status < 500
    assert type(error) is not NotSent
    if error is not None:
        error.reason.encode()


def check_call(call) -> None:
    json.dumps(call.request)
    assert len(call.answer) <= 4000
    assert "\x00" not in call.answer + call.outcome


@settings(max_examples=150, deadline=None)
@given(statuses, answers)
def test_a_create_ends_in_a_typed_statement_or_one_of_three_errors(status, content):
    statement = ask(lambda gateway, calls: gateway.create(order(), calls), status, content)
    if statement is not None:
        assert 200 <= status < 300
        check_statement(statement)


@settings(max_examples=80, deadline=None)
@given(statuses, answers)
def test_a_look_up_ends_in_a_typed_statement_or_one_of_three_errors(status, content):
    statement = ask(lambda gateway, calls: gateway.poll(GATEWAY_ID, calls), status, content)
    if statement is not None:
        assert statement.gateway_id == GATEWAY_ID
        check_statement(statement)


@settings(max_examples=80, deadline=None)
@given(statuses, answers)
def test_a_search_ends_in_typed_statements_or_one_of_three_errors(status, content):
    reference = "test_live_recurrent_11"
    found = ask(lambda gateway, calls: gateway.find(reference, calls), status, content)
    for statement in found or []:
        assert statement.reference_id == reference
        check_statement(statement)


@settings(max_examples=80, deadline=None)
@given(statuses, answers)
def test_a_sale_ends_in_a_typed_hint_or_one_of_three_errors(status, content):
    answer = ask(lambda gateway, calls: gateway.sale(Secret(BEARER), calls), status, content)
    if answer is not None:
        assert type(answer) is SaleAnswer
        assert answer.http_status == status
        for text in (answer.status, answer.resolution):
            assert text is None or type(text) is str
        assert type(answer.needs_customer) is bool


@settings(max_examples=80, deadline=None)
@given(values | payloads)
def test_a_card_is_read_as_typed_values_from_any_payload_that_is_json(payload):
    try:
        card = stored_card(json.dumps(invoice(payload=payload)).encode())
    except UnreadableError:
        with pytest.raises(ValueError, match="not JSON compliant"):  # Infinity and NaN
            json.dumps(payload, allow_nan=False)
        return
    if card is not None:
        check_card(card)
