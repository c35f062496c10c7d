import json

import pytest


@pytest.fixture
def hosted(merchant):
    """Create an invoice that a customer pays on the hosted page."""

    def create(token=None, *, tokenize=False, **changes):
        options = {"cardgate": {"tokenize": True}} if tokenize else []
        return merchant.create(token, gateway_options=options, flow="charge", **changes)

    return create


def test_the_documented_tokenise_order_is_accepted(merchant, documented):
    invoice = merchant.invoice(merchant.post(documented("01")))

    assert invoice.bearer is None
    assert invoice.attributes["status"] == "process_pending"


def test_paying_a_tokenise_invoice_charges_it_and_mints_a_token(merchant, hosted):
    invoice = hosted(tokenize=True)

    reply = merchant.gateway.pay_on_page(invoice.gateway_id)

    paid = json.loads(reply.body)["data"]["attributes"]
    assert (reply.status, paid["status"]) == (200, "processed")
    assert 32 <= len(paid["payload"]["token"]) <= 39  # The lengths seen in samples.
    assert paid["payload"] == merchant.look(invoice)["payload"]
    assert len(merchant.debits()) == 1


def test_a_minted_token_pays_the_next_instant_invoice_of_its_customer(merchant, hosted):
    reply = merchant.gateway.pay_on_page(hosted(tokenize=True).gateway_id)
    token = merchant.invoice(reply).attributes["payload"]["token"]

    merchant.sold(token, reference_id="renewal")

    assert len(merchant.debits("renewal")) == 1


def test_a_minted_token_is_unknown_for_any_other_customer(merchant, hosted):
    reply = merchant.gateway.pay_on_page(hosted(tokenize=True).gateway_id)
    token = merchant.invoice(reply).attributes["payload"]["token"]

    stolen = merchant.post(merchant.order(token, customer={"reference_id": "somebody-else"}))

    assert stolen.status == 422


def test_two_cards_get_two_tokens(merchant, hosted):
    tokens = {
        merchant.invoice(
            merchant.gateway.pay_on_page(
                hosted(tokenize=True, reference_id=f"order-{n}").gateway_id
            )
        ).attributes["payload"]["token"]
        for n in range(2)
    }

    assert len(tokens) == 2


def test_a_predefined_token_invoice_is_paid_by_hand_and_mints_nothing(merchant, hosted):
    invoice = hosted("needs_3ds")

    merchant.gateway.pay_on_page(invoice.gateway_id)

    attributes = merchant.look(invoice)
    assert (attributes["status"], attributes["payload"]["token"]) == ("processed", None)


def test_the_page_that_flow_data_names_plays_the_customer(merchant, hosted):
    invoice = hosted(tokenize=True, reference_id="<order>")
    page = invoice.attributes["flow_data"]["action"].removeprefix("http://sandbox.invalid")

    html = merchant.request("GET", page).body.decode()
    target = html.partition('action="')[2].partition('"')[0]

    assert "Pay 9.99 USD" in html
    assert "&lt;order&gt;" in html
    assert merchant.request("POST", target).status == 200
    assert merchant.status(invoice) == "processed"


def test_the_page_lives_where_the_client_reached_the_gateway(merchant):
    headers = {"AUTHORIZATION": merchant.credentials, "host": "127.0.0.1:8088"}
    order = json.dumps(merchant.order(amount=1)).encode()

    reply = merchant.gateway.handle("POST", "/payment-invoices", headers, order)

    action = merchant.invoice(reply).attributes["flow_data"]["action"]
    assert action == "http://127.0.0.1:8088/hpp/cgi_sandbox000000001"


def test_an_instant_invoice_has_no_page_and_cannot_be_paid_by_hand(merchant):
    invoice = merchant.create()

    assert merchant.request("GET", "/hpp/cgi_sandbox000000001").status == 404
    assert merchant.gateway.pay_on_page(invoice.gateway_id).status == 409


def test_a_paid_or_expired_page_cannot_be_paid_again(merchant, hosted, clock):
    paid, expired = hosted(), hosted()
    merchant.gateway.pay_on_page(paid.gateway_id)
    clock.move(3600)

    assert merchant.gateway.pay_on_page(paid.gateway_id).status == 409
    assert merchant.gateway.pay_on_page(expired.gateway_id).status == 409
    assert merchant.gateway.pay_on_page("cpi_nobody").status == 404
    assert len(merchant.debits()) == 1
