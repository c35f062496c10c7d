from __future__ import annotations

import json
import signal
import subprocess
import sys

import psutil

from tests.support.processes import CLI, clean_environment, command, eventually


def test_the_demo_charges_nobody_twice_and_loses_nothing(tmp_path):
    done = command("demo", "--folder", str(tmp_path), "--json", settings={}, seconds=60)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["charged_twice"], result["lost"]) == (0, 0)
    assert result["debits"] == result["paid"] == 46
    assert len(result["unknown"]) == 4
    assert sum(line["count"] for line in result["invoices"]) == 60
    settings = {"BILLING_DATABASE_URL": f"sqlite:///{tmp_path}/billing.db"}
    explained = command("explain", "demo-45-p0", settings=settings)
    assert "attempt.succeeded" in explained.stdout
    assert "answer_lost_after.45" not in explained.stdout


def test_up_runs_until_it_is_asked_to_stop_and_leaves_no_process(tmp_path):
    child = subprocess.Popen(
        [*CLI, "up", "--folder", str(tmp_path)], env=clean_environment({}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        log = tmp_path / "worker.log"
        eventually(lambda: log.exists() and "ready." in log.read_text(), 30, why="worker ready")
        family = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 0, output
    assert "export BILLING_DATABASE_URL=" in output
    assert not [process for process in family if process.is_running()]


def test_importing_the_command_line_is_quick_and_needs_no_database_library():
    script = (
        "import sys, time; t = time.perf_counter(); import billing_worker.entrypoints.cli;"
        "print(time.perf_counter() - t); print('sqlalchemy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment({}), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    seconds, loaded = done.stdout.split()
    assert loaded == "False"
    assert float(seconds) < 0.5
