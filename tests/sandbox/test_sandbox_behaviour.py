import json
from decimal import Decimal

import pytest

from billing_worker.sandbox.behaviour import Behaviour
from billing_worker.sandbox.gateway import SandboxGateway

FULL = Decimal("9.99")


def test_a_second_sale_is_refused_unless_told_otherwise(merchant):
    invoice = merchant.sold("approved")

    reply = merchant.sell(invoice)

    assert reply.status == 422
    assert merchant.debits() == [FULL]


def test_an_ignored_second_sale_repeats_the_answer_and_moves_nothing(merchant_of):
    merchant = merchant_of(second_sale="ignore")
    invoice = merchant.create("approved")

    first, second = merchant.sell(invoice), merchant.sell(invoice)

    assert first == second
    assert merchant.debits() == [FULL]


def test_an_ignored_second_sale_tells_at_last_how_the_lost_one_ended(merchant_of):
    merchant = merchant_of(second_sale="ignore")
    invoice = merchant.sold("answer_lost_after")

    assert json.loads(merchant.sell(invoice).body)["status"] == "processed"
    assert merchant.debits() == [FULL]


def test_an_ignored_second_sale_of_a_declined_invoice_repeats_the_decline(merchant_of):
    merchant = merchant_of(second_sale="ignore")
    invoice = merchant.create("decline_declined")

    assert merchant.sell(invoice) == merchant.sell(invoice)


@pytest.mark.parametrize("token", ["approved", "answer_lost_after", "slow", "approved_later"])
def test_a_charging_second_sale_takes_the_money_twice(merchant_of, clock, token):
    merchant = merchant_of(second_sale="charge")
    invoice = merchant.sold(token)

    merchant.sell(invoice)

    clock.move(60)
    assert merchant.debits() == [FULL, FULL]
    assert merchant.look(invoice)["processed_amount"] == 9.99


@pytest.mark.parametrize("second_sale", ["refuse", "ignore", "charge"])
@pytest.mark.parametrize("token", ["approved", "pending_forever"])
def test_no_sale_of_an_expired_invoice_is_charged(merchant_of, clock, second_sale, token):
    merchant = merchant_of(lifetime_seconds=60, second_sale=second_sale)
    invoice = merchant.create(token)
    clock.move(60)

    assert merchant.sell(invoice).status == 422
    assert merchant.status(invoice) == "expired"
    assert merchant.debits() == []


def test_a_declined_invoice_cannot_be_sold_again(merchant_of):
    merchant = merchant_of(second_sale="charge")

    assert merchant.sell(merchant.sold("decline_declined")).status == 422


def test_a_gateway_that_charges_final_invoices_can_be_played(merchant_of, clock):
    merchant = merchant_of(lifetime_seconds=60, sale_on_final="charge")
    invoice = merchant.create("approved")
    clock.move(7200)  # The bearer has expired as well.

    assert merchant.sell(invoice).status == 200
    assert merchant.status(invoice) == "processed"
    assert merchant.debits() == [FULL]


def test_a_bearer_is_refused_from_its_expiry_on(merchant_of, clock):
    merchant = merchant_of(lifetime_seconds=86_400)
    invoice = merchant.create()

    clock.move(3600)

    assert merchant.sell(invoice).status == 401
    assert merchant.debits() == []


def test_a_bearer_is_good_until_its_last_second(merchant_of, clock):
    merchant = merchant_of(lifetime_seconds=86_400)
    invoice = merchant.create()

    clock.move(3599)

    assert merchant.sell(invoice).status == 200


@pytest.mark.parametrize("authorization", ["", "Bearer nonsense", "Basic c2FuZGJveDpzYW5kYm94"])
def test_a_sale_needs_the_bearer_of_an_invoice(merchant, authorization):
    merchant.create()

    reply = merchant.gateway.handle("POST", "/payment/sale", {"Authorization": authorization}, b"")

    assert reply.status == 401


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"data":{"type":"sale-operation"}}',
        b'{"data":{"type":"sale-operation","attributes":[]}}',
        b'{"data":{"type":"sale","attributes":{}}}',
    ],
)
def test_a_sale_with_a_wrong_body_is_refused_and_moves_nothing(merchant, body):
    headers = {"Authorization": f"Bearer {merchant.create().bearer}"}

    assert merchant.gateway.handle("POST", "/payment/sale", headers, body).status == 422
    assert merchant.debits() == []


def test_the_nested_answer_has_every_key_of_the_documented_one(merchant_of, documented):
    merchant = merchant_of(sale_shape="nested")

    body = json.loads(merchant.sell(merchant.create()).body)

    theirs = documented("10")
    assert body.keys() == theirs.keys()
    assert body["data"].keys() == theirs["data"].keys()
    assert body["data"]["attributes"].keys() == theirs["data"]["attributes"].keys()
    assert body["data"]["attributes"]["status"] == "processed"


def test_a_nested_3ds_answer_keeps_its_auth_payload_at_the_top(merchant_of, documented):
    merchant = merchant_of(sale_shape="nested")

    body = json.loads(merchant.sell(merchant.create("needs_3ds")).body)

    assert body["auth_payload"].keys() == documented("11")["auth_payload"].keys()
    attributes = body["data"]["attributes"]
    assert attributes["status"] == "process_pending"
    assert attributes["active_payment"]["status"] == "authorize_required"


def test_a_known_reference_makes_a_second_invoice_in_the_worst_case(merchant):
    first, second = merchant.create(), merchant.create()

    assert first.gateway_id != second.gateway_id
    merchant.sell(first)
    merchant.sell(second)
    assert merchant.debits() == [FULL, FULL]


def test_a_known_reference_can_bring_back_its_invoice(merchant_of):
    merchant = merchant_of(duplicate_create="return_existing")
    first = merchant.create()

    reply = merchant.post(merchant.order())

    assert reply.status == 200
    assert merchant.invoice(reply) == first


@pytest.mark.parametrize("status", [409, 422, 429])
def test_a_known_reference_can_be_refused(merchant_of, status):
    merchant = merchant_of(duplicate_create=str(status))
    merchant.create()

    reply = merchant.post(merchant.order())

    assert reply.status == status
    assert json.loads(reply.body)["errors"][0]["status"] == str(status)
    listed = merchant.request("GET", "/payment-invoices?filter[reference_id]=order-1")
    assert len(json.loads(listed.body)["data"]) == 1


def test_a_create_that_failed_is_no_duplicate(merchant_of):
    merchant = merchant_of(duplicate_create="422")
    assert merchant.post(merchant.order("create_error_500")).status == 500

    assert merchant.post(merchant.order("create_error_500")).status == 201


def test_an_invoice_expires_at_the_second_its_lifetime_ends(merchant_of, clock):
    merchant = merchant_of(lifetime_seconds=60)
    invoice = merchant.sold("pending_forever")

    clock.move(59)
    assert merchant.status(invoice) == "process_pending"
    clock.move(1)
    assert merchant.status(invoice) == "expired"


def test_a_changed_lifetime_applies_to_later_invoices_only(merchant, clock):
    before = merchant.create(reference_id="before")
    merchant.gateway.behaviour = Behaviour(lifetime_seconds=10)
    after = merchant.create(reference_id="after")

    clock.move(10)

    assert merchant.status(before) == "process_pending"
    assert merchant.status(after) == "expired"


def test_a_clock_that_jumps_back_undoes_nothing(merchant, clock):
    invoice = merchant.sold("approved_later")
    clock.move(60)
    assert merchant.status(invoice) == "processed"

    clock.move(-3600)

    assert merchant.status(invoice) == "processed"
    assert merchant.debits() == [FULL]


def test_latency_is_added_to_every_answer_of_the_documented_apis_only(merchant_of):
    merchant = merchant_of(latency_seconds=0.25)
    invoice = merchant.create()

    late = [
        merchant.sell(invoice),
        merchant.request("GET", f"/payment-invoices/{invoice.gateway_id}"),
        merchant.request("GET", "/payment-invoices"),
        merchant.post(merchant.order("answer_lost_after")),
    ]

    assert [reply.delay_seconds for reply in late] == [0.25] * 4
    assert merchant.request("GET", "/_sandbox/ledger").delay_seconds == 0


@pytest.mark.parametrize(
    "switch",
    [
        {"duplicate_create": "409!"},
        {"second_sale": None},
        {"sale_on_final": "ignore"},
        {"sale_shape": "round"},
        {"lifetime_seconds": -1},
        {"latency_seconds": float("nan")},
        {"later_seconds": float("inf")},
    ],
)
def test_a_value_that_no_switch_has_is_refused(switch):
    with pytest.raises(ValueError, match=next(iter(switch))):
        Behaviour(**switch)


def test_a_gateway_cannot_be_built_with_an_unknown_switch():
    with pytest.raises(TypeError):
        SandboxGateway(Behaviour(lost_rate=0.1), None)
