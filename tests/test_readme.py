"""The README, the Procfile and the compose file are held to the code, line by line."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from billing_worker.config import described
from billing_worker.entrypoints.cli import _COMMANDS
from tests.support.processes import ROOT

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROCESSES = dict(
    line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines() if line
)


def table(first_column):
    """Rows of the README's table whose header begins with this word."""
    block = README.split(f"| {first_column} |", 1)[1].split("\n\n", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize("info", described(), ids=lambda info: info.variable)
def test_the_settings_table_says_what_the_code_says(info):
    _, meaning, default = table("variable")[info.variable]
    assert meaning == info.meaning + (" (secret)" if info.secret else "")
    expected = {None: "required", "": "empty"}.get(info.default, f"`{info.default}`")
    assert default == expected


def test_the_settings_table_has_no_setting_that_does_not_exist():
    assert set(table("variable")) == {info.variable for info in described()}


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
    known = {info.variable for info in described()}
    required = {info.variable for info in described() if info.default is None}
    assert required <= environment <= known


def test_compose_names_no_container_so_that_workers_scale():
    for service in COMPOSE["services"].values():
        assert "container_name" not in service


def test_the_first_commands_of_the_readme_are_the_documented_two():
    shell = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert shell[0].endswith("billing-worker demo")
    assert shell[1].endswith("pytest")


def test_ci_runs_the_readmes_test_command_in_a_fresh_environment():
    script = (ROOT / ".ci/run").read_text()
    assert "-m venv" in script
    assert "'.[test]'" in script
    assert "pytest" in script
