"""The measured settings, read off the live application: a change of one is a decision."""

from __future__ import annotations

import json
import shelve
import subprocess
import sys
from pathlib import Path

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
    "worker_enable_remote_control": False,
    "worker_soft_shutdown_timeout": 0,
    "beat_max_loop_interval": 5,
    "beat_scheduler": "celery.beat:Scheduler",
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


WHERE = """
from celery.app.utils import find_app
app = find_app("billing_worker")
connections = [app.connection_for_read(), app.connection_for_write(), app.pool.connection]
print([c.as_uri() for c in connections], app.backend.as_uri())
"""


def test_worker_and_beat_use_the_configured_redis_whatever_celerys_own_variables_say():
    names = ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND")
    theirs = {f"CELERY_{name}": "redis://stranger:1/0" for name in names}
    told = subprocess.run(
        [sys.executable, "-c", WHERE],
        env=clean_environment(GOOD | theirs), cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "stranger" not in told
    assert told.count("redis:6379/0") == 4


class Planted:
    """Unpickling it creates a file: code that the planter has chosen."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_planted_schedule_file_is_not_read_by_the_beat(tmp_path):
    schedule, proof = tmp_path / "celerybeat-schedule", tmp_path / "code-ran"
    with shelve.open(str(schedule)) as shelf:  # noqa: S301 - that is the attack
        shelf["entries"] = Planted(proof)
    planted = sorted(tmp_path.iterdir())
    environ = clean_environment(GOOD | {"PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-m", "celery", "-A", "billing_worker", "beat", "-s", str(schedule)]
    with subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE) as beat:
        # It has read its schedule before it looks for the broker.
        assert any(b"Trying again" in line for line in beat.stderr)
        beat.terminate()
    assert sorted(tmp_path.iterdir()) == planted


def test_a_package_that_is_missing_is_named():
    start = "import sys; sys.modules['structlog'] = None\n" + READ % "[]"
    done = subprocess.run(
        [sys.executable, "-c", start], env=clean_environment(GOOD), cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "billing-worker cannot start. import of structlog halted" in done.stderr
