import json
from datetime import UTC, datetime
from decimal import Decimal

from billing_worker.sandbox.ledger import Debit, Ledger


def debit(reference_id="order-1", amount="9.99", currency="USD"):
    at = datetime(2026, 1, 31, tzinfo=UTC)
    return Debit(reference_id, "cpi_1", "customer-1", Decimal(amount), currency, at, True)


def test_totals_are_exact_where_floats_are_not():
    ledger = Ledger()
    for _ in range(10):
        ledger.record(debit(amount="0.1"))
    ledger.record(debit(amount="3", currency="JPY"))

    assert ledger.totals() == {"USD": Decimal("1.0"), "JPY": Decimal(3)}


def test_debits_are_found_by_reference_in_the_order_of_happening():
    ledger = Ledger()
    for reference_id, amount in (("a", "1"), ("b", "2"), ("a", "3")):
        ledger.record(debit(reference_id, amount))

    assert [entry.amount for entry in ledger.debits_for("a")] == [Decimal(1), Decimal(3)]
    assert ledger.debits_for("c") == ()
    assert ledger.by_reference().keys() == {"a", "b"}  # Asking for "c" has left no trace.
    assert [entry.amount for entry in ledger] == [Decimal(1), Decimal(2), Decimal(3)]
    assert len(ledger) == 3


def test_a_debit_says_who_paid_what_and_when(merchant):
    invoice = merchant.sold("approved.17", customer={"reference_id": "customer-7"})

    [entry] = merchant.gateway.ledger

    assert entry == Debit(
        reference_id="order-1",
        gateway_id=invoice.gateway_id,
        customer_reference_id="customer-7",
        amount=Decimal("9.99"),
        currency="USD",
        at=merchant.clock.now(),
        test_mode=True,
    )


def test_the_ledger_shows_what_was_really_debited_under_the_reference_that_was_ordered(merchant):
    for what in ("currency", "amount", "test_mode", "reference"):
        merchant.sold(f"wrong_{what}")

    entries = merchant.gateway.ledger.debits_for("order-1")

    assert [(entry.amount, entry.currency, entry.test_mode) for entry in entries] == [
        (Decimal("9.99"), "EUR", True),
        (Decimal("10.99"), "USD", True),
        (Decimal("9.99"), "USD", False),
        (Decimal("9.99"), "USD", True),
    ]


def test_the_ledger_can_be_read_over_the_wire(merchant):
    merchant.sold("approved_later")
    merchant.sold("approved", reference_id="order-2", amount=20)
    merchant.clock.move(10)

    reply = merchant.gateway.handle("GET", "/_sandbox/ledger", {}, b"")

    assert json.loads(reply.body) == {
        "debits": [
            {
                "reference_id": "order-2",
                "gateway_id": "cpi_sandbox000000002",
                "customer_reference_id": "customer-1",
                "amount": 20,
                "currency": "USD",
                "at": "2026-01-31T12:00:00+00:00",
                "test_mode": True,
            },
            {
                "reference_id": "order-1",
                "gateway_id": "cpi_sandbox000000001",
                "customer_reference_id": "customer-1",
                "amount": 9.99,
                "currency": "USD",
                "at": "2026-01-31T12:00:10+00:00",
                "test_mode": True,
            },
        ],
        "totals": {"USD": 29.99},
    }


def test_requests_are_counted_by_operation_and_reference(merchant):
    invoice = merchant.create()
    merchant.post(merchant.order(amount=None))
    for _ in range(3):
        merchant.sell(invoice)
    merchant.look(invoice)
    merchant.request("GET", "/payment-invoices?filter[reference_id]=order-2")
    merchant.request("GET", "/payment-invoices")

    counts = json.loads(merchant.gateway.handle("GET", "/_sandbox/requests", {}, b"").body)

    assert counts == {
        "operations": {"create": 2, "find": 2, "look": 1, "sale": 3},
        "references": {
            "order-1": {"create": 2, "find": 0, "look": 1, "sale": 3},
            "order-2": {"create": 0, "find": 1, "look": 0, "sale": 0},
        },
    }
    assert merchant.gateway.requests.total("sale") == 3
    assert merchant.gateway.requests.for_reference("sale", "order-1") == 3
    assert merchant.gateway.requests.for_reference("sale", "nobody") == 0


def test_behaviour_changes_at_run_time_and_keeps_what_was_not_named(merchant):
    reply = merchant.request(
        "POST", "/_sandbox/behaviour", b'{"second_sale":"charge","duplicate_create":409}'
    )

    assert json.loads(reply.body)["second_sale"] == "charge"
    assert merchant.gateway.behaviour.duplicate_create == "409"
    assert merchant.gateway.behaviour.lifetime_seconds == 3600
    merchant.sell(merchant.sold("approved"))
    assert len(merchant.debits()) == 2


def test_a_behaviour_that_does_not_exist_is_refused_and_changes_nothing(merchant):
    before = merchant.gateway.behaviour
    for body in (b'{"second_sale":"x"}', b'{"lost_rate":1}', b'{"later_seconds":"soon"}', b"{"):
        assert merchant.request("POST", "/_sandbox/behaviour", body).status == 422

    assert merchant.gateway.behaviour == before


def test_a_reset_forgets_money_invoices_counts_and_changed_behaviour(merchant, clock):
    first = merchant.sold("approved_later")
    merchant.request("POST", "/_sandbox/behaviour", b'{"second_sale":"charge"}')

    assert merchant.request("POST", "/_sandbox/reset").status == 200

    clock.move(60)
    assert len(merchant.gateway.ledger) == 0
    assert merchant.gateway.requests.total("create") == 0
    assert merchant.gateway.behaviour.second_sale == "refuse"
    assert merchant.request("GET", f"/payment-invoices/{first.gateway_id}").status == 404
    assert merchant.create().gateway_id == first.gateway_id
