import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from billing_worker.sandbox.card_outcomes import OUTCOMES
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from tests.sandbox.conftest import Merchant


def play_every_token(merchant):
    """Return the bytes of a long conversation."""
    transcript = []
    for number, token in enumerate(OUTCOMES):
        reply = merchant.post(merchant.order(token, reference_id=f"order-{number}"))
        transcript.append(reply)
        if reply.status == 201:
            transcript.append(merchant.sell(merchant.invoice(reply)))
        merchant.clock.move(7)
        transcript.append(merchant.request("GET", "/payment-invoices"))
    transcript.append(merchant.request("GET", "/_sandbox/ledger"))
    return transcript


def test_the_same_calls_at_the_same_times_give_the_same_bytes(merchant_of, clock):
    start = clock.time
    first = play_every_token(merchant_of())
    clock.time = start
    second = play_every_token(merchant_of())

    assert first == second


def test_a_replay_after_a_reset_gives_the_same_bytes(merchant, clock):
    start = clock.time
    first = play_every_token(merchant)
    merchant.gateway.reset()
    clock.time = start

    assert play_every_token(merchant) == first


def test_a_hundred_threads_that_sell_one_invoice_charge_it_once(merchant):
    invoice = merchant.create()
    statuses = Counter()
    gate = threading.Barrier(100)

    def sell():
        gate.wait()
        statuses[merchant.sell(invoice).status] += 1

    threads = [threading.Thread(target=sell) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert statuses == {200: 1, 422: 99}
    assert len(merchant.debits()) == 1


def test_one_request_happens_at_a_time():
    inside, most = [], []

    def slow_clock():
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.001)  # Long enough for every other thread to come in, if it could.
        inside.pop()
        return START

    gateway = SandboxGateway(Behaviour(), slow_clock)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(16):
            pool.submit(gateway.handle, "GET", "/_sandbox/ledger", {}, b"")
            pool.submit(lambda: gateway.ledger)
            pool.submit(gateway.advance)
            pool.submit(gateway.pay_on_page, "cpi_nobody")

    assert (len(most), max(most)) == (64, 1)


FIELDS = st.sampled_from(
    [
        "data",
        "type",
        "attributes",
        "reference_id",
        "amount",
        "currency",
        "customer",
        "gateway_options",
        "cardgate",
        "token",
        "metadata",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=6),
    max_leaves=12,
)
START = datetime(2026, 1, 31, tzinfo=UTC)
CREDENTIALS = {"Authorization": "Basic c2FuZGJveDpzYW5kYm94"}
GOOD = {
    "test_mode": True,
    "reference_id": "order-1",
    "currency": "USD",
    "amount": 9.99,
    "service": "payment_card_usd_hpp",
    "token": "approved",
    "customer": {"reference_id": "customer-1"},
    "gateway_options": {"cardgate": {"instant": True}},
}


@settings(deadline=None)
@given(document=JSON, target=st.sampled_from(["/payment-invoices", "/_sandbox/behaviour"]))
def test_no_json_makes_the_gateway_fall_over(document, target):
    gateway = SandboxGateway(Behaviour(), lambda: START)
    body = json.dumps(document).encode()

    reply = gateway.handle("POST", target, CREDENTIALS, body)

    assert reply.status in {200, 400, 422}


@settings(deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [
                "test_mode",
                "reference_id",
                "currency",
                "amount",
                "service",
                "token",
                "customer",
                "gateway_options",
                "metadata",
                "return_urls",
                "callback_url",
                "description",
            ]
        ),
        JSON,
        max_size=3,
    )
)
def test_no_field_makes_the_gateway_fall_over(changes):
    gateway = SandboxGateway(Behaviour(), lambda: START)
    attributes = {**GOOD, **changes}
    body = json.dumps({"data": {"type": "payment-invoices", "attributes": attributes}}).encode()

    reply = gateway.handle("POST", "/payment-invoices", CREDENTIALS, body)

    assert reply.status in {201, 422}


def test_a_sandbox_that_begins_again_with_another_first_number_gives_no_id_twice(clock):
    """Whoever kept its books over the restart would take a new invoice for an old one."""

    def ids(gateway):
        merchant = Merchant(gateway, clock)
        return [merchant.create(reference_id=f"order-{n}").gateway_id for n in range(3)]

    before = ids(SandboxGateway(Behaviour(), clock.now))
    after = ids(SandboxGateway(Behaviour(), clock.now, first_number=4))
    assert before == [f"cpi_sandbox00000000{n}" for n in (1, 2, 3)]
    assert after == [f"cpi_sandbox00000000{n}" for n in (4, 5, 6)]


def test_a_reset_keeps_the_first_number(clock):
    merchant = Merchant(SandboxGateway(Behaviour(), clock.now, first_number=4), clock)
    first = merchant.create().gateway_id
    assert merchant.request("POST", "/_sandbox/reset").status < 300
    assert merchant.create().gateway_id == first == "cpi_sandbox000000004"
