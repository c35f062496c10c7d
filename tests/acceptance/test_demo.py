from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest
from click.testing import CliRunner

from billing_worker.config import BadSettings, load
from billing_worker.entrypoints.cli import demo
from billing_worker.entrypoints.cli.up import _announce
from billing_worker.entrypoints.local.stack import LocalStack
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from tests.support.processes import CLI, WITHIN, clean_environment, command, eventually
from tests.support.world import KEY


def test_the_demo_charges_nobody_twice_and_loses_nothing(tmp_path):
    done = command("demo", "--folder", str(tmp_path), "--json", settings={}, seconds=110)
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


@contextmanager
def up(folder, settings=None):
    """`billing-worker up` with a worker that is ready; (process, its family)."""
    child = subprocess.Popen(
        [*CLI, "up", "--folder", str(folder)], env=clean_environment(settings or {}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        log = folder / "worker.log"
        eventually(lambda: log.exists() and "ready." in log.read_text(), why="worker ready")
        yield child, psutil.Process(child.pid).children(recursive=True)
    finally:
        child.kill()
        child.communicate()


def alive(family):
    return [process for process in family if _is_alive(process)]


def _is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.is_running()
    except psutil.NoSuchProcess:
        return False


@pytest.mark.again  # `up` is started, and all of it ended, by the test below as well
def test_up_runs_until_it_is_asked_to_stop_and_leaves_no_process(tmp_path):
    with up(tmp_path) as (child, family):
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=WITHIN)
    assert child.returncode == 0, output
    assert "export BILLING_DATABASE_URL=" in output
    assert not alive(family)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_up_leaves_no_process_and_gives_its_folder_free(tmp_path):
    with up(tmp_path) as (child, family):
        names = {" ".join(process.cmdline()) for process in family}
        assert any(" worker " in name for name in names)
        assert any(" beat " in name for name in names)
        assert any("valkey-server" in name for name in names)
        twin = command("demo", "--folder", str(tmp_path), settings={})
        child.kill()
        eventually(lambda: not alive(family), why="worker, beat and Redis end")
    assert twin.returncode == 1
    assert twin.stderr == (
        f"Error: `demo` or `up` (pid {child.pid}) is running in {tmp_path}: "
        "stop it, or choose another --folder\n"
    )
    with LocalStack(tmp_path, {}) as again:
        assert again.sources["BILLING_REDIS_URL"] == "provided"


def test_the_demo_refuses_a_folder_with_books_in_one_line(tmp_path):
    (tmp_path / "billing.db").touch()
    done = command("demo", "--folder", str(tmp_path), settings={})
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: there are books in {tmp_path} already")
    assert done.stderr.count("\n") == 1


def test_a_demo_that_did_not_settle_in_time_says_what_is_open_and_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "LONGEST_SECONDS", 0)
    result = CliRunner().invoke(demo.demo, ["--folder", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "NOT SETTLED within 0 s" in result.output
    assert "60 still open: demo-01-p0" in result.output
    assert "explain demo-01-p0" in result.output


def test_up_says_where_each_setting_comes_from_and_overrides_none(tmp_path, capsys):
    password = tmp_path / "password"
    password.write_text("from-a-file")
    key = tmp_path / "key"
    key.write_text(KEY)
    given = {
        "BILLING_GATEWAY_URL": "http://127.0.0.1:9/api",
        "BILLING_CARDGATE_URL": "http://127.0.0.1:9",
        "BILLING_GATEWAY_USERNAME": "coma_1",
        "BILLING_GATEWAY_PASSWORD_FILE": str(password),
        "BILLING_TEST_MODE": "true",
        "BILLING_VAULT_KEYS_FILE": str(key),
    }
    with LocalStack(tmp_path / "data", given) as stack:
        _announce(stack, load(stack.environ))
    output = capsys.readouterr().out
    assert "BILLING_GATEWAY_USERNAME=coma_1  (environment)" in output
    assert f"BILLING_GATEWAY_PASSWORD=***  (file {password})" in output
    assert f"BILLING_VAULT_KEYS=***  (file {key})" in output
    assert "BILLING_REDIS_URL=redis://127.0.0.1  (provided)" in output
    assert "sandbox" not in output
    assert "from-a-file" not in output
    assert not (tmp_path / "data/vault.key").exists()


@pytest.mark.parametrize(
    "given", [{"BILLING_GATEWAY_USERNAME": "coma_1"}, {"BILLING_GATEWAY_PASSWORD_FILE": "/x"}]
)
def test_the_sandbox_never_stands_in_for_half_a_gateway(given, tmp_path):
    with LocalStack(tmp_path, given) as stack:
        assert stack.sandbox is None
        with pytest.raises(BadSettings) as caught:
            load(stack.environ)
    assert caught.value.faults["BILLING_GATEWAY_URL"] == "is missing."


def test_the_sandbox_stands_in_when_only_the_mode_is_given(tmp_path):
    with LocalStack(tmp_path, {"BILLING_TEST_MODE": "false"}) as stack:
        assert stack.sandbox is not None
        assert stack.environ["BILLING_TEST_MODE"] == "false"


def test_up_waits_for_a_redis_that_is_away_with_one_clear_line(tmp_path):
    child = subprocess.Popen(
        [*CLI, "up", "--folder", str(tmp_path)],
        env=clean_environment({"BILLING_REDIS_URL": "redis://:s3cret@127.0.0.1:1/0"}),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = child.stderr.readline()
        child.send_signal(signal.SIGTERM)
        _, rest = child.communicate(timeout=WITHIN)
    finally:
        child.kill()
    assert line.startswith("Redis redis://127.0.0.1 is unreachable, trying again: ")
    assert "refused" in line
    assert (rest, child.returncode) == ("", 0)
    assert not (tmp_path / "worker.log").exists()


def test_up_does_not_start_in_test_mode_on_a_live_book(tmp_path):
    with Store(f"sqlite:///{tmp_path / 'billing.db'}") as store:
        migrate(store)
        with store.transaction() as connection:
            books.set_mode(connection, test_mode=False)
    ended = subprocess.run(
        [*CLI, "up", "--folder", str(tmp_path)],
        env=clean_environment({}), capture_output=True, text=True, check=False, timeout=WITHIN,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "this book charges in live mode, and BILLING_TEST_MODE=true says test" in ended.stderr
    assert not (tmp_path / "worker.log").exists()


def test_importing_the_command_line_is_quick_and_loads_no_library_of_its_commands():
    heavy = "{'sqlalchemy', 'redis', 'requests', 'flask', 'rich', 'iso4217', 'marshmallow'}"
    script = (
        "import sys, time; t = time.process_time(); import billing_worker.entrypoints.cli;"
        f"print(time.process_time() - t); print({heavy} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment({}), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    seconds, loaded = done.stdout.split()
    assert loaded == "set()"
    assert float(seconds) < 0.5
