from __future__ import annotations

import signal
import socket
from dataclasses import replace

import pytest
import requests
from cryptography.fernet import Fernet

from tests.support.processes import CELERY, Process, beat, eventually, worker


def test_worker_and_beat_charge_what_is_due_once_and_the_worker_has_counted_it(installation):
    installation.subscribe(count=30)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    installation.settings["BILLING_METRICS_PORT"] = str(port)
    with worker(installation.settings, installation.folder), \
            beat(installation.settings, installation.folder):  # fmt: skip
        eventually(lambda: installation.paid() == 30, why="30 paid")
        counted = 'billing_attempts_total{origin="scheduled",outcome="succeeded"} 30.0'
        where = f"http://127.0.0.1:{port}/metrics"
        eventually(lambda: counted in requests.get(where, timeout=5).text, why="30 counted")
    assert set(installation.debits_per_invoice().values()) == {1}


@pytest.mark.again
def test_a_port_of_metrics_that_is_taken_costs_no_charge(installation):
    installation.subscribe()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        installation.settings["BILLING_METRICS_PORT"] = str(taken.getsockname()[1])
        with worker(installation.settings, installation.folder) as process, \
                beat(installation.settings, installation.folder):  # fmt: skip
            eventually(lambda: installation.paid() == 1, why="paid")
            process.says("metrics.not_served")


def test_two_workers_and_two_beats_charge_once(installation):
    installation.subscribe(count=100)
    with worker(installation.settings, installation.folder, "one"), \
            worker(installation.settings, installation.folder, "two"), \
            beat(installation.settings, installation.folder, "beat-one"), \
            beat(installation.settings, installation.folder, "beat-two"):  # fmt: skip
        eventually(lambda: installation.paid() == 100, why="100 paid")
    assert set(installation.debits_per_invoice().values()) == {1}


def test_a_worker_killed_in_the_middle_of_a_sale_captures_once(installation):
    """The money moves at once, and the answer comes when the worker is long dead."""
    installation.sandbox.behaviour = replace(installation.sandbox.behaviour, slow_seconds=60)
    installation.settings["BILLING_GATEWAY_TIMEOUT_SECONDS"] = "60"
    installation.subscribe("slow")
    with beat(installation.settings, installation.folder):
        with worker(installation.settings, installation.folder, "killed") as first:
            eventually(lambda: len(installation.sandbox.ledger) == 1, why="the sale arrived")
            first.signal(signal.SIGKILL)
            first.wait()
        assert installation.explain()["attempts"][0]["status"] == "submitted"
        with worker(installation.settings, installation.folder, "successor"):
            eventually(lambda: installation.paid() == 1, why="found paid")
    assert installation.sandbox.requests.for_reference("sale", "sub-1-p0-a1") == 1
    assert installation.debits_per_invoice() == {"sub-1-p0": 1}


def test_a_worker_asked_to_stop_finishes_the_charge_in_flight(installation):
    installation.subscribe("slow")
    with worker(installation.settings, installation.folder) as process, \
            beat(installation.settings, installation.folder):  # fmt: skip
        eventually(lambda: len(installation.sandbox.ledger) == 1, why="the sale arrived")
        assert process.terminate() == 0
    assert installation.explain()["fate"] == "paid"


def test_a_wiped_broker_loses_no_charge(installation):
    installation.subscribe(count=60)
    with worker(installation.settings, installation.folder), \
            beat(installation.settings, installation.folder):  # fmt: skip
        for _ in range(5):
            installation.redis.wipe()
        eventually(lambda: installation.paid() == 60, why="60 paid")
    assert set(installation.debits_per_invoice().values()) == {1}


def test_a_redis_restart_does_not_end_the_worker(installation):
    installation.subscribe(count=10)
    with worker(installation.settings, installation.folder) as process, \
            beat(installation.settings, installation.folder):  # fmt: skip
        installation.redis.kill()
        installation.redis.start()
        eventually(lambda: installation.paid() == 10, why="10 paid")
        assert process.terminate() == 0


def test_no_secret_is_in_the_logs_of_a_worker(installation):
    installation.subscribe("html_502_after", count=5)
    with worker(installation.settings, installation.folder) as process, \
            beat(installation.settings, installation.folder):  # fmt: skip
        eventually(lambda: installation.paid() == 5, why="5 paid")
    assert '"task": "billing.charge"' in process.output
    for secret in ("html_502_after", "eyJ", installation.settings["BILLING_VAULT_KEYS"]):
        assert secret not in process.output


@pytest.mark.again
def test_a_worker_with_the_wrong_keys_says_so_once_and_its_successor_charges_everything(
    installation,
):
    """Ten claims take ten seconds here: before, they left every invoice to nobody."""
    installation.subscribe(count=30)
    wrong = installation.settings | {"BILLING_VAULT_KEYS": Fernet.generate_key().decode()}
    with beat(installation.settings, installation.folder):
        with worker(wrong, installation.folder, "wrong") as process:
            eventually(lambda: process.output.count("charge.crashed") >= 2, why="two trials")
            assert process.output.count("billing.alert") == 1
            assert "BILLING_VAULT_KEYS open none of the 30 card tokens" in process.output
            assert wrong["BILLING_VAULT_KEYS"] not in process.output
        assert not installation.sandbox.ledger
        with installation.store.transaction() as connection:  # not to wait the minute for a ring
            connection.exec_driver_sql(
                "UPDATE invoices SET enqueue_at = now() WHERE status = 'open'"
            )
        with worker(installation.settings, installation.folder, "right"):
            eventually(lambda: installation.paid() == 30, why="30 paid")
    assert set(installation.debits_per_invoice().values()) == {1}


@pytest.mark.parametrize("process", ["worker", "beat"])
def test_missing_settings_are_all_named_and_nothing_starts(installation, process):
    started = Process([*CELERY, process], {}, installation.folder / "bad.log")
    assert started.wait() == 2
    for name in ("DATABASE_URL", "REDIS_URL", "GATEWAY_URL", "VAULT_KEYS", "TEST_MODE"):
        assert f"BILLING_{name}: is missing." in started.output
    assert "Traceback" not in started.output
