from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from billing_worker.entrypoints.cli import cli


def _commands(group: click.Group, names: tuple[str, ...] = ()):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, (*names, name))
        else:
            yield pytest.param(command, (*names, name), id=" ".join((*names, name)))


COMMANDS = list(_commands(cli))


def _example(command: click.Command) -> str:
    lines = [line.strip() for line in (command.help or "").splitlines()]
    return lines[lines.index("Example:") + 1]


def _words(example: str) -> list[str]:
    """Without the shell's redirections."""
    words = shlex.split(example)
    return words[: next((n for n, word in enumerate(words) if word in {"<", ">"}), None)]


@pytest.mark.parametrize(("command", "names"), COMMANDS)
def test_the_help_of_every_command_has_an_example_that_the_command_accepts(
    command, names, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("customers.jsonl").touch()
    program, *words = _words(_example(command))
    assert (program, *words[: len(names)]) == ("billing-worker", *names)
    command.make_context(names[-1], words[len(names) :])


@pytest.mark.parametrize("command", [param.values[0] for param in COMMANDS])
def test_the_example_of_a_command_fits_on_one_line_of_its_help(command):
    lines = click.Context(command, terminal_width=80).get_help().splitlines()
    assert f"    {_example(command)}" in lines
    assert max(map(len, lines)) <= 80
