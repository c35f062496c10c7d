import base64
import json
from decimal import Decimal

import pytest

from billing_worker.sandbox import wire


def kinds(document):
    """Reduce a document to its keys and the JSON kinds of its values."""
    match document:
        case dict():
            return {key: kinds(value) for key, value in document.items()}
        case list():
            return [kinds(value) for value in document]
        case bool() | str():
            return type(document).__name__
        case int() | float():
            return "number"
    return None


def agree(ours, theirs):
    """Say where two reduced documents differ; null fits everything, [] every object."""
    match ours, theirs:
        case (None | [], _) | (_, None | []):
            return []
        case dict(), dict():
            missing = [f"{key} on one side only" for key in ours.keys() ^ theirs.keys()]
            common = ours.keys() & theirs.keys()
            return missing + [
                f"{key}.{fault}" for key in common for fault in agree(ours[key], theirs[key])
            ]
        case list(), list():
            return agree(ours[0], theirs[0])
    return [] if ours == theirs else [f"is {ours}, documented as {theirs}"]


def differences(ours, theirs, *, free=()):
    """`free` names attributes whose content is the merchant's own."""
    for document in (ours, theirs):
        for attribute in free:
            document["data"]["attributes"][attribute] = None
    return agree(kinds(ours), kinds(theirs))


def test_the_answer_to_a_create_has_the_documented_shape(merchant, documented):
    reply = merchant.post(documented("05"))

    assert reply.status == 422  # The printed token is nobody's script.
    order = documented("05")
    order["data"]["attributes"]["token"] = "approved"
    reply = merchant.post(order)
    assert reply.status == 201
    assert differences(json.loads(reply.body), documented("06")) == []


def test_the_answer_to_a_hosted_create_has_the_documented_shape(merchant, documented):
    order = documented("03")
    order["data"]["attributes"]["token"] = "approved"

    reply = merchant.post(order)

    assert reply.status == 201
    assert differences(json.loads(reply.body), documented("04")) == []


def test_the_answer_to_a_look_has_every_key_of_the_fullest_captured_body(merchant, documented):
    urls = {"success": "https://m.example/s", "pending": "https://m.example/p"}
    invoice = merchant.sold(
        "approved", metadata={"key": "value"}, return_urls={**urls, "fail": "https://m.example/f"}
    )

    reply = merchant.request("GET", f"/payment-invoices/{invoice.gateway_id}")

    ours, theirs = json.loads(reply.body), documented("17")
    for body in (ours, theirs):
        body["data"]["attributes"]["payload"]["payment_card"].pop("verification")
    assert differences(ours, theirs) == []


def test_a_search_answers_the_few_attributes_that_are_known_of_it(merchant, documented):
    merchant.sold("approved")

    reply = merchant.request("GET", "/api/payment-invoices/?filter[reference_id]=order-1")

    assert reply.status == 200
    assert agree(kinds(json.loads(reply.body)), kinds(documented("94"))) == []


def test_a_refused_create_has_the_error_shape_that_clients_read(merchant, documented):
    reply = merchant.post(merchant.order(amount=None))

    assert reply.status == 422
    [error] = json.loads(reply.body)["errors"]
    assert error == {
        **documented("93")["errors"][0],
        "detail": "amount is required",
    }


def test_a_fresh_instant_invoice_is_pending_and_carries_its_bearer(merchant):
    invoice = merchant.create()

    assert invoice.attributes["status"] == "process_pending"
    assert invoice.attributes["resolution"] == "ok"
    assert merchant.look(invoice)["flow_data"]["metadata"]["token"] == invoice.bearer
    assert merchant.debits() == []


def test_the_bearer_is_a_jwt_that_names_its_session_and_expires_after_an_hour(merchant):
    invoice = merchant.create()

    header, claims, signature = invoice.bearer.split(".")
    assert json.loads(base64.urlsafe_b64decode(header + "==")) == {"typ": "JWT", "alg": "RS512"}
    assert json.loads(base64.urlsafe_b64decode(claims + "==")) == {
        "sid": invoice.attributes["flow_data"]["metadata"]["sid"],
        "expires": None,
        "exp": invoice.attributes["created"] + 3600,
    }
    assert signature


def test_ids_have_the_shape_of_real_ones(merchant, documented):
    invoice = merchant.create()

    real = documented("06")["data"]
    assert len(invoice.gateway_id) == len(real["id"])
    assert len(invoice.attributes["flow_data"]["metadata"]["sid"]) == len(
        real["attributes"]["flow_data"]["metadata"]["sid"]
    )


def test_links_point_below_api_whatever_the_client_used(merchant):
    reply = merchant.request(
        "POST", "/payment-invoices", json.dumps(merchant.order(amount=1)).encode()
    )

    data = json.loads(reply.body)["data"]
    assert data["links"]["self"] == f"/api/payment-invoices/{data['id']}"


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize("query", ["filter[reference_id]=a%2Fb", "filter%5Breference_id%5D=a/b"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_an_invoice_is_found_by_its_exact_reference(merchant, prefix, query, slash):
    wanted = merchant.create(reference_id="a/b")
    merchant.create(reference_id="a/bc")

    reply = merchant.request("GET", f"{prefix}/payment-invoices{slash}?{query}")

    assert [row["id"] for row in json.loads(reply.body)["data"]] == [wanted.gateway_id]


def test_a_search_for_an_unknown_reference_is_answered_with_an_empty_list(merchant):
    reply = merchant.request("GET", "/payment-invoices?filter[reference_id]=nobody")

    assert (reply.status, json.loads(reply.body)) == (200, {"data": []})


def test_a_list_without_a_filter_shows_the_latest_hundred(merchant):
    made = [merchant.create(reference_id=f"order-{n}").gateway_id for n in range(101)]

    reply = merchant.request("GET", "/payment-invoices")

    assert [row["id"] for row in json.loads(reply.body)["data"]] == made[1:]


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Basic", "Basic c2FuZGJveDp3cm9uZw==", "Bearer c2FuZGJveDpzYW5kYm94"],
)
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/api/payment-invoices"),
        ("GET", "/api/payment-invoices/cpi_sandbox000000001"),
        ("GET", "/payment-invoices?filter[reference_id]=order-1"),
    ],
)
def test_nothing_of_the_private_api_opens_without_credentials(
    merchant, authorization, method, target
):
    merchant.create()
    headers = {} if authorization is None else {"Authorization": authorization}

    reply = merchant.gateway.handle(method, target, headers, b"")

    assert reply.status == 401
    assert json.loads(reply.body)["errors"][0]["status"] == "401"
    assert reply.headers["WWW-Authenticate"].startswith("Basic")


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/"),
        ("GET", "/api/payment-invoices/cpi_nobody"),
        ("GET", "/payment-invoicesX"),
        ("DELETE", "/payment-invoices"),
        ("GET", "/payment/sale"),
        ("GET", "/hpp/cgi_nobody"),
        ("GET", "/_sandbox/nothing"),
    ],
)
def test_an_unknown_address_is_not_found(merchant, method, target):
    assert merchant.request(method, target).status == 404


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"reference_id": None}, "reference_id is required"),
        ({"reference_id": ""}, "reference_id must be a string with something in it"),
        ({"reference_id": 7}, "reference_id must be a string with something in it"),
        ({"amount": None}, "amount is required"),
        ({"amount": 0}, "amount must be above 0 and at most 1000000000"),
        ({"amount": "0.00"}, "amount must be above 0 and at most 1000000000"),
        ({"amount": 1_000_000_001}, "amount must be above 0 and at most 1000000000"),
        ({"amount": -1}, "amount must be above 0 and at most 1000000000"),
        ({"amount": True}, "amount must be a number in major units"),
        ({"amount": "1,5"}, "amount must be a number in major units"),
        ({"amount": 1.00001}, "amount has at most 4 decimals"),
        ({"amount": float("nan")}, "amount must be a number in major units"),
        ({"currency": None}, "currency is required"),
        ({"currency": "usd"}, "currency must be three capital letters"),
        ({"service": None}, "service is required"),
        ({"service": "payment_card_eur_hpp"}, "service must be payment_card_usd_hpp"),
        ({"customer": {}}, "customer.reference_id is required"),
        ({"customer": []}, "customer.reference_id is required"),
        ({"token": None}, "token is required with gateway_options.cardgate.instant"),
        ({"test_mode": "yes"}, "test_mode must be true or false"),
        ({"callback_url": "m.example/callback"}, "callback_url must be a URL"),
        ({"metadata": {str(n): n for n in range(21)}}, "metadata has at most 20 keys"),
        ({"token": "aproved"}, "token is unknown for this customer"),
        ({"token": "approvedX.1"}, "token is unknown for this customer"),
        ({"token": "rejects_token.1"}, "token is unknown for this customer"),
    ],
)
def test_an_order_that_breaks_a_rule_is_refused_in_words(merchant, changes, detail):
    reply = merchant.post(merchant.order(**changes))

    assert reply.status == 422
    assert [error["detail"] for error in json.loads(reply.body)["errors"]] == [detail]
    assert json.loads(merchant.request("GET", "/payment-invoices").body) == {"data": []}


@pytest.mark.parametrize("amount", ["1e999999999", "1e-999999999", "0." + "1" * 60])
def test_an_absurd_amount_is_refused_without_being_written_out(merchant, amount):
    order = json.dumps(merchant.order(amount="AMOUNT")).replace('"AMOUNT"', amount)

    assert merchant.request("POST", "/payment-invoices", order.encode()).status == 422


def test_one_refusal_names_every_fault(merchant):
    reply = merchant.post({"data": {"type": "nonsense", "attributes": []}})

    details = [error["detail"] for error in json.loads(reply.body)["errors"]]
    assert details == [
        "data.type must be payment-invoices",
        "currency is required",
        "reference_id is required",
        "amount is required",
        "service is required",
        "customer.reference_id is required",
    ]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 10_000], ids=lambda body: str(body[:4])
)
def test_a_body_that_is_no_json_is_a_bad_request(merchant, body):
    assert merchant.request("POST", "/payment-invoices", body).status == 400


@pytest.mark.parametrize(
    ("sent", "written"),
    [
        ("9.99", b"9.99"),
        ("10.00", b"10"),
        ("9.90", b"9.9"),
        ('"100"', b"100"),
        ("1e2", b"100"),
        ("0.1", b"0.1"),
        ("1000000000", b"1000000000"),
        ("999999999.9999", b"999999999.9999"),
    ],
)
def test_amounts_come_back_exactly_as_json_numbers(merchant, sent, written):
    order = json.dumps(merchant.order(amount="AMOUNT")).replace('"AMOUNT"', sent)

    reply = merchant.request("POST", "/payment-invoices", order.encode())

    assert b'"amount":' + written + b"," in reply.body
    assert b'"payment_amount":' + written + b"," in reply.body


def test_bodies_are_written_the_way_php_writes_them(merchant):
    reply = merchant.post(merchant.order(description="zażółć", reference_id="a/b"))

    assert reply.body.isascii()
    assert rb'"reference_id":"a\/b"' in reply.body
    assert b'"metadata":[]' in reply.body
    assert json.loads(reply.body)["data"]["attributes"]["description"] == "zażółć"


def test_twenty_keys_of_metadata_are_echoed(merchant):
    metadata = {str(n): n for n in range(20)}

    assert merchant.create(metadata=metadata).attributes["metadata"] == metadata


def test_a_callback_url_beside_the_attributes_has_no_effect(merchant):
    order = merchant.order()
    order["data"]["callback_url"] = "https://m.example/callback"

    assert merchant.invoice(merchant.post(order)).attributes["callback_url"] is None


def test_a_customer_keeps_one_id(merchant):
    customers = [
        json.loads(merchant.post(merchant.order(customer={"reference_id": who})).body)["data"][
            "relationships"
        ]["customer"]["data"]["id"]
        for who in ("ann", "ann", "bob")
    ]

    assert customers == ["cus_sandbox000000001", "cus_sandbox000000001", "cus_sandbox000000002"]


def test_exact_numbers_survive_reading_and_writing():
    document = wire.load(b'{"a":0.1,"b":12345678901234.5678}')

    assert document == {"a": Decimal("0.1"), "b": Decimal("12345678901234.5678")}
    assert wire.dump(document) == b'{"a":0.1,"b":12345678901234.5678}'
