from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from redis import Redis

from billing_worker.config import load
from billing_worker.entrypoints.web.app import create_app
from billing_worker.services.monitoring.metrics import METRICS
from tests.entrypoints.test_config import GOOD
from tests.support.processes import ROOT
from tests.support.redis_server import RedisServer

TOKEN = "reader-token-of-prometheus-0123456789"
PAGE = ROOT / "docs" / "monitoring.md"
RULES = ROOT / "docs" / "monitoring" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "monitoring" / "dashboard.json"


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def get(sqlite_url, redis):
    def get(token=TOKEN, **changes):
        settings = GOOD | {
            "BILLING_DATABASE_URL": sqlite_url,
            "BILLING_REDIS_URL": redis.url,
            "BILLING_API_TOKENS": TOKEN,
        }
        client = create_app(load(settings | changes)).test_client()
        return client.get("/metrics", headers={"Authorization": f"Bearer {token}"})

    return get


def test_metrics_need_a_token(get):
    assert get("wrong").status_code == 401
    assert get(BILLING_API_TOKENS="").status_code == 503


def test_every_metric_that_is_shown_is_declared_and_a_queue_shows_its_depth(get, redis):
    with Redis.from_url(redis.url) as client:
        client.delete("billing.charges")
        client.lpush("billing.charges", "a", "b")
    answer = get()
    assert answer.status_code == 200
    assert 'billing_queue_depth{queue="billing.charges"} 2.0' in answer.text
    shown = set(re.findall(r"^# TYPE (\S+) ", answer.text, re.MULTILINE))
    assert shown <= METRICS.keys()


def test_without_redis_the_depths_are_missing_and_the_rest_is_there(get):
    answer = get(BILLING_REDIS_URL="redis://127.0.0.1:1/0")
    assert answer.status_code == 200
    assert "billing_queue_depth{" not in answer.text
    assert "billing_sales_enabled" in answer.text


def test_without_the_database_metrics_answer_503_in_one_sentence(get):
    answer = get(BILLING_DATABASE_URL="postgresql://u:s3cret@127.0.0.1:1/billing")
    assert answer.status_code == 503
    assert answer.text == "the database does not answer\n"


@pytest.fixture
def frozen_database():
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"postgresql://u:s3cret@127.0.0.1:{server.getsockname()[1]}/billing"


def test_a_frozen_database_is_told_of_within_two_seconds_to_everybody_who_asks(
    redis, frozen_database
):
    urls = {"BILLING_DATABASE_URL": frozen_database, "BILLING_REDIS_URL": redis.url}
    app = create_app(load(GOOD | urls | {"BILLING_API_TOKENS": TOKEN}))

    def ask(path):
        began = time.monotonic()
        answer = app.test_client().get(path, headers={"Authorization": f"Bearer {TOKEN}"})
        return answer, time.monotonic() - began

    with ThreadPoolExecutor(6) as pool:
        asked = list(pool.map(ask, ["/metrics", "/health/ready"] * 3))
    assert [answer.status_code for answer, _ in asked] == [503] * 6
    assert max(seconds for _, seconds in asked) < 2
    assert asked[0][0].text == "the database does not answer\n"
    state = asked[1][0].json
    assert state["database"] == "not ready: no answer within two seconds"
    assert state["redis"].startswith("answers")
    hanging = [one for one in threading.enumerate() if "Patient" in one.name]
    assert len(hanging) <= 3, "each question hangs once: the figures, the database, the sweeps"


def test_the_page_names_every_metric_with_its_kind_its_labels_and_its_meaning():
    rows = re.findall(
        r"^\| `(billing_\w+)` \| (\w+) \| ?((?:`\w+`(?:, )?)*) ?\| (.+) \|$",
        PAGE.read_text(),
        re.MULTILINE,
    )
    ours = [m for m in METRICS.values() if not m.by_worker]
    ours += [m for m in METRICS.values() if m.by_worker]
    labelled = [(m, ", ".join(f"`{label}`" for label in m.labels)) for m in ours]
    assert rows == [(m.name, m.kind, labels, m.help) for m, labels in labelled]


def _used(expressions):
    """The declared metrics that are used. Raises KeyError for one that is not declared."""
    names = {name for one in expressions for name in re.findall(r"billing_\w+", one)}
    parts = {
        f"{m.name}{suffix}": m.name
        for m in METRICS.values()
        for suffix in (("_count", "_bucket", "_sum") if m.kind == "histogram" else ("",))
    }
    return {parts[name] for name in names}


def test_every_alert_uses_declared_metrics_and_has_its_paragraph():
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    assert _used(rule["expr"] for rule in rules)
    told = re.findall(r"^\*\*(Billing\w+)\.\*\*", PAGE.read_text(), re.MULTILINE)
    assert told == [rule["alert"] for rule in rules]


def test_the_dashboard_shows_every_declared_metric_and_no_other():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert _used(shown) == METRICS.keys()


NIGHT = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - name: a beat that dies after an hour pages ten minutes later, not before
    interval: 1m
    input_series:
      - series: 'billing_sweep_last_success_timestamp_seconds{{sweep="billing.renew"}}'
        values: '0+60x60 3600x60'
      - {{series: 'billing_sweep_allowed_age_seconds{{sweep="billing.renew"}}', values: '600x120'}}
      - {{series: billing_sales_enabled, values: '1x120'}}
      - {{series: 'billing_queue_depth{{queue="billing.charges"}}', values: '0x120'}}
    alert_rule_test:
      - {{eval_time: 70m, alertname: BillingSilent, exp_alerts: []}}
      - eval_time: 71m
        alertname: BillingSilent
        exp_alerts:
          - exp_labels: {{severity: page, sweep: billing.renew}}
            exp_annotations:
              summary: "billing.renew has not finished for 11m 0s."
  - name: a day of charges that is more than twice its forecast pages, one of equal amounts does not
    interval: 10m
    input_series:
      - {{series: 'billing_charged_minor_total{{currency="EUR"}}', values: '0+100x300'}}
      - {{series: 'billing_forecast_minor{{currency="EUR"}}', values: '7000x300'}}
      - {{series: 'billing_charged_minor_total{{currency="USD"}}', values: '0+100x300'}}
      - {{series: 'billing_forecast_minor{{currency="USD"}}', values: '14400x300'}}
    alert_rule_test:
      - {{eval_time: 10h, alertname: BillingChargedTooMuch, exp_alerts: []}}
      - eval_time: 40h
        alertname: BillingChargedTooMuch
        exp_alerts:
          - exp_labels: {{severity: page, currency: EUR}}
            exp_annotations:
              summary: "More than twice the forecast was charged in EUR within a day."
  - name: a gateway that answers nothing pages after ten minutes, declines and breaches page too
    interval: 1m
    input_series:
      - {{series: 'billing_gateway_call_seconds_count{{call="sale",result="unknown"}}', values: '0+60x60'}}
      - {{series: 'billing_gateway_call_seconds_count{{call="poll",result="answered"}}', values: '0+20x60'}}
      - {{series: 'billing_attempts_total{{outcome="declined",origin="scheduled"}}', values: '0+9x120'}}
      - {{series: 'billing_attempts_total{{outcome="succeeded",origin="scheduled"}}', values: '0+1x120'}}
      - {{series: 'billing_invariant_breaches{{invariant="payment_pays"}}', values: '0x30 2x30'}}
      - {{series: 'billing_queue_depth{{queue="billing.commands"}}', values: '0x10 3x50'}}
    alert_rule_test:
      - {{eval_time: 9m, alertname: BillingGatewayFailing, exp_alerts: []}}
      - eval_time: 12m
        alertname: BillingGatewayFailing
        exp_alerts:
          - exp_labels: {{severity: page}}
            exp_annotations:
              summary: "75% of the requests to the gateway get no usable answer."
      - eval_time: 60m
        alertname: BillingDeclinesRise
        exp_alerts:
          - exp_labels: {{severity: ticket}}
            exp_annotations:
              summary: "90% of the attempts of the last hour were declined."
      - {{eval_time: 30m, alertname: BillingBooksContradict, exp_alerts: []}}
      - eval_time: 31m
        alertname: BillingBooksContradict
        exp_alerts:
          - exp_labels: {{severity: page, invariant: payment_pays}}
            exp_annotations:
              summary: "2 row(s) break the invariant payment_pays."
      - {{eval_time: 20m, alertname: BillingCommandsLate, exp_alerts: []}}
      - eval_time: 28m
        alertname: BillingCommandsLate
        exp_alerts:
          - exp_labels: {{severity: ticket, queue: billing.commands}}
            exp_annotations:
              summary: "3 command(s) of other services have waited for ten minutes."
  - name: a night in which everything works and nothing is due is silent
    interval: 1m
    input_series:
      - series: 'billing_sweep_last_success_timestamp_seconds{{sweep="billing.renew"}}'
        values: '0+60x600'
      - series: 'billing_sweep_last_success_timestamp_seconds{{sweep="billing.warn_expiring"}}'
        values: '0x60 3600x60 7200x60 10800x60 14400x60 18000x60 21600x60 25200x60 28800x60 32400x60'
      - {{series: 'billing_sweep_allowed_age_seconds{{sweep="billing.renew"}}', values: '600x600'}}
      - {{series: 'billing_sweep_allowed_age_seconds{{sweep="billing.warn_expiring"}}', values: '10800x600'}}
      - {{series: billing_services_paused, values: '0x600'}}
      - {{series: 'billing_invariant_breaches{{invariant="payment_pays"}}', values: '0x600'}}
      - {{series: 'billing_queue_depth{{queue="billing.commands"}}', values: '0 2 0 1 0x600'}}
      - {{series: 'billing_charged_minor_total{{currency="EUR"}}', values: '0+10x600'}}
      - {{series: 'billing_forecast_minor{{currency="EUR"}}', values: '14000x600'}}
      - {{series: 'billing_attempts_total{{outcome="declined",origin="dunning"}}', values: '0 1 2 3 4x600'}}
      - {{series: 'billing_gateway_call_seconds_count{{call="sale",result="answered"}}', values: '0+60x600'}}
      - {{series: 'billing_gateway_call_seconds_count{{call="sale",result="unknown"}}', values: '0+1x600'}}
      - {{series: billing_sales_enabled, values: '1x600'}}
      - {{series: billing_due_oldest_age_seconds, values: '0x600'}}
      - {{series: billing_unknown_oldest_age_seconds, values: '0x600'}}
      - {{series: billing_outbox_lag_seconds, values: '0x600'}}
      - {{series: 'billing_queue_depth{{queue="billing.charges"}}', values: '0x600'}}
    alert_rule_test: [{quiet}]
"""


@pytest.mark.promtool
@pytest.mark.skipif(
    "BILLING_TEST_PROMTOOL" not in os.environ,
    reason="BILLING_TEST_PROMTOOL names no promtool: apt-get download prometheus has it",
)
def test_promtool_accepts_metrics_and_rules_and_alerts_fire_at_the_right_minute(get, tmp_path):
    def run(*arguments, given=None):
        program = os.environ["BILLING_TEST_PROMTOOL"]
        return subprocess.run(
            [program, *arguments], check=False, input=given, capture_output=True, text=True
        )

    remarks = run("check", "metrics", given=get().text).stderr.splitlines()
    # The names are agreed; a count of rows is no part of a histogram.
    suffix = 'non-histogram and non-summary metrics should not have "_count" suffix'
    assert remarks == [f"billing_due_count {suffix}", f"billing_unknown_count {suffix}"]
    rules = run("check", "rules", str(RULES))
    assert rules.returncode == 0, rules.stderr
    alerts = [rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]
    quiet = ", ".join(
        f"{{eval_time: {minutes}m, alertname: {alert}, exp_alerts: []}}"
        for alert in alerts
        for minutes in (30, 120, 600)
    )
    test = tmp_path / "night.yml"
    test.write_text(NIGHT.format(rules=RULES, quiet=quiet))
    tested = run("test", "rules", str(test))
    assert tested.returncode == 0, tested.stdout + tested.stderr
