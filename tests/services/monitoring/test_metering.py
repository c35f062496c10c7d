"""What a worker counts, read back as Prometheus reads it."""

from __future__ import annotations

import re
import socket
from dataclasses import replace
from datetime import timedelta

import pytest
import requests

from billing_worker.config import load
from billing_worker.domain.secret import Secret
from billing_worker.gateway.paycore import GatewaySettings, PaycoreGateway
from billing_worker.metering import PrometheusMeter
from billing_worker.services.monitoring.metrics import METRICS
from tests.entrypoints.test_config import GOOD
from tests.support.world import KEY


@pytest.fixture
def meter(world):
    meter = PrometheusMeter(world.ports.breaker)
    settings = GatewaySettings(
        api_url="https://gateway.test/api",
        username=world.sandbox.username,
        password=Secret(world.sandbox.password),
        cardgate_url="https://cardgate.test",
    )
    gateway = PaycoreGateway(world.transport, world.clock, settings, meter.called)
    world.ports = replace(world.ports, meter=meter, gateway=gateway)
    return meter


def _value(meter, name, **labels):
    return meter.registry.get_sample_value(name, labels)


def test_attempts_declines_and_money_are_counted_once_they_are_committed(world, meter):
    world.subscribe("approved", "sub-1")
    world.subscribe("decline_card_expired", "sub-2")
    world.subscribe("decline_insufficient_funds", "sub-3", currency="EUR")
    world.run_for(timedelta(minutes=2))
    attempts = "billing_attempts_total"
    assert _value(meter, attempts, outcome="succeeded", origin="scheduled") == 1
    assert _value(meter, attempts, outcome="declined", origin="scheduled") == 2
    assert _value(meter, "billing_declines_total", **{"class": "hard"}) == 1
    assert _value(meter, "billing_declines_total", **{"class": "soft"}) == 1
    assert _value(meter, "billing_charged_minor_total", currency="USD") == 999
    assert _value(meter, "billing_charged_minor_total", currency="EUR") is None


def test_a_request_is_counted_by_what_became_of_it_in_few_words(world, meter):
    world.subscribe("never_answers_after")
    world.tick()
    calls = "billing_gateway_call_seconds_count"
    assert _value(meter, calls, call="create", result="answered") == 1
    assert _value(meter, calls, call="sale", result="unknown") == 1
    world.transport.unreachable = True
    world.clock.advance(60)
    world.tick()
    assert _value(meter, calls, call="poll", result="not_sent") >= 1


def test_an_attempt_that_a_rule_forbids_is_counted_by_the_rule(world, meter):
    one = {"reference_id": "ann"}
    for number in range(11):
        world.subscribe("decline_insufficient_funds.ann", f"sub-{number}", customer=one)
    world.run_for(timedelta(minutes=2))
    refused = _value(meter, "billing_refusals_total", rule="mastercard.10_declines_in_24_hours")
    assert refused >= 1


def test_a_worker_that_starts_no_charges_shows_it(world, meter):
    assert _value(meter, "billing_breaker_open") == 0
    world.ports.breaker.open(world.clock.monotonic())
    assert _value(meter, "billing_breaker_open") == 1


def test_what_a_worker_shows_is_declared_and_holds_no_secret_and_no_reference(world, meter):
    world.subscribe("approved", "sub-secret-name")
    world.tick()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meter.serve("127.0.0.1", port)
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    shown = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", text, re.MULTILINE))
    assert shown == {m.name for m in METRICS.values() if m.by_worker}
    for secret in (world.sandbox.password, KEY, "approved", "sub-secret-name", "cgi_"):
        assert secret not in text


def test_a_worker_shows_its_metrics_to_its_own_machine_unless_told_otherwise():
    assert load(GOOD).metrics_port is None
    assert load(GOOD | {"BILLING_METRICS_PORT": "9100"}).metrics_host == "127.0.0.1"
