"""The measured settings, read off the live application: a change of one is a decision."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from billing_worker.config import load
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.persistence import sweep_runs
from billing_worker.persistence.store import Store
from billing_worker.services.commands.records import TASKS as COMMAND_TASKS
from tests.entrypoints.test_config import GOOD
from tests.support.processes import ROOT, clean_environment

EXPECTED = {
    # Only answers to commands are left there, each a copy of a row; no task leaves a result.
    "result_backend": GOOD["BILLING_REDIS_URL"],
    "result_expires": 3600,
    "task_ignore_result": True,
    "task_serializer": "json",
    "accept_content": ["json"],
    "timezone": "UTC",
    "enable_utc": True,
    "task_acks_late": False,
    "task_reject_on_worker_lost": False,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "worker_eta_task_limit": 100,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "task_publish_retry": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "task_create_missing_queues": False,
    "task_time_limit": None,
    "task_soft_time_limit": None,
    "worker_pool": "threads",
    "worker_send_task_events": False,
    "worker_soft_shutdown_timeout": 0,
    "beat_max_loop_interval": 5,
}
TRANSPORT = {
    "socket_timeout": 5,
    "socket_connect_timeout": 3,
    "socket_keepalive": True,
    "health_check_interval": 5,
    "visibility_timeout": 3600,
    "retry_on_timeout": False,
}
READ = """
import json
from celery.app.utils import find_app
app = find_app("billing_worker")
app.loader.import_default_modules()
ours = {n: t for n, t in app.tasks.items() if n.startswith("billing.")}
print(json.dumps({
    "conf": {name: app.conf[name] for name in json.loads(%r)},
    "transport": app.conf.broker_transport_options,
    "tasks": {n: [t.max_retries, getattr(t, "autoretry_for", None), t.acks_late, t.ignore_result]
              for n, t in ours.items()},
    "schedules": {n: [e["task"], repr(e["schedule"]), e["options"]]
                  for n, e in app.conf.beat_schedule.items()},
    "routes": app.conf.task_routes,
    "queues": [q.name for q in app.conf.task_queues],
}, default=str))
"""


@pytest.fixture(scope="module")
def live():
    done = subprocess.run(
        [sys.executable, "-c", READ % json.dumps(list(EXPECTED))],
        env=clean_environment(GOOD), cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_live_app_has_the_measured_setting(live, name):
    assert live["conf"][name] == EXPECTED[name]


@pytest.mark.parametrize("name", TRANSPORT)
def test_the_broker_connection_has_the_measured_option(live, name):
    assert live["transport"][name] == TRANSPORT[name]


def test_the_queues_have_plain_names_so_that_any_client_can_write_to_them(live):
    assert "global_keyprefix" not in live["transport"]
    assert "billing.commands" in live["queues"]


def test_every_command_is_routed_to_the_queue_of_commands(live):
    assert set(live["routes"]) == set(COMMAND_TASKS) <= set(live["tasks"])
    assert {route["queue"] for route in live["routes"].values()} == {"billing.commands"}


def test_no_task_retries_by_itself_or_acknowledges_late(live):
    assert live["tasks"]
    for _max_retries, autoretry_for, acks_late, ignores_result in live["tasks"].values():
        assert not autoretry_for
        assert not acks_late
        assert ignores_result


def test_beat_knows_only_intervals_of_tasks_that_exist_and_ticks_that_expire(live):
    for task, schedule, options in live["schedules"].values():
        assert task in live["tasks"]
        assert float(schedule) > 0
        assert options["expires"] == float(schedule) * 3
        assert options["queue"] in live["queues"]


def test_no_task_module_uses_what_delays_or_retries_a_message():
    for path in (ROOT / "billing_worker").rglob("*.py"):
        source = path.read_text()
        for forbidden in ("countdown=", "eta=", ".retry(", "autoretry_for"):
            assert forbidden not in source, f"{path.name} uses {forbidden}"


RUN_ALL = """
import json
from celery.app.utils import find_app
app = find_app("billing_worker")
app.loader.import_default_modules()
for entry in app.conf.beat_schedule.values():
    app.tasks[entry["task"]]()
"""


def test_every_task_of_the_beat_records_that_it_has_finished(sqlite_url):
    environ = clean_environment(GOOD | {"BILLING_DATABASE_URL": sqlite_url})
    subprocess.run([sys.executable, "-c", RUN_ALL], env=environ, cwd=ROOT, check=True)
    with Store(sqlite_url) as store, store.reading() as connection:
        assert sweep_runs.last(connection).keys() == intervals(load(GOOD)).keys()
