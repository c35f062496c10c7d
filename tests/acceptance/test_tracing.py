"""Spans from sweep to sale, made by OpenTelemetry's own instrumentations around a real worker."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import CELERY, Process, beat, eventually

pytestmark = [
    pytest.mark.again,
    pytest.mark.skipif(
        importlib.util.find_spec("opentelemetry") is None,
        reason="the optional extra is not installed: pip install '.[otel]'",
    ),
]

INSTRUMENT = [str(Path(sys.executable).with_name("opentelemetry-instrument"))]


def _spans(log):
    """The spans that the exporter for people prints: one JSON object after another."""
    decoder, text, found = json.JSONDecoder(), log, []
    for start in (match.start() for match in re.finditer(r"^\{$", text, re.MULTILINE)):
        span, _ = decoder.raw_decode(text, start)
        found.append(span)
    return found


def test_the_sale_belongs_to_the_trace_of_the_sweep_and_no_span_holds_a_secret(installation):
    installation.subscribe(count=2)
    settings = installation.settings | {
        "OTEL_TRACES_EXPORTER": "console",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    command = [*INSTRUMENT, *CELERY, "worker", "--without-gossip", "--without-mingle"]
    process = Process(command, settings, installation.folder / "traced.log")
    try:
        with beat(installation.settings, installation.folder):
            eventually(lambda: installation.paid() == 2, why="paid")
            eventually(lambda: "/payment/sale" in process.output, why="the sale's span")
        assert process.terminate() == 0
    finally:
        process.kill()
    spans = _spans(process.output)
    sales = [s for s in spans if "/payment/sale" in json.dumps(s["attributes"])]
    assert len(sales) == 2
    for sale in sales:
        trace = [
            s["name"] for s in spans if s["context"]["trace_id"] == sale["context"]["trace_id"]
        ]
        assert "run/billing.charge" in trace
        assert {"run/billing.renew", "run/billing.ring"} & set(trace)
    told = json.dumps(spans)
    pair = f"{installation.sandbox.username}:{installation.sandbox.password}"
    credential = base64.b64encode(pair.encode()).decode()
    card_token, vault_key = "approved", settings["BILLING_VAULT_KEYS"]
    for secret in (card_token, vault_key, credential, "Bearer", "Basic"):
        assert secret not in told
