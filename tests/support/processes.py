"""Real workers, beats and commands, as a user would start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CELERY = [sys.executable, "-m", "celery", "-A", "billing_worker"]
CLI = [sys.executable, "-c", "from billing_worker.entrypoints.cli import main; main()"]


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("BILLING_")}
    return ours | {"PYTHONPATH": str(ROOT)} | dict(settings)


def command(
    *arguments: str, settings: Mapping[str, str], seconds: float = 60, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `billing-worker ARGUMENTS` to its end."""
    return subprocess.run(
        [*CLI, *arguments],
        env=clean_environment(settings),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        **options,
    )


class Process:
    def __init__(self, arguments: Sequence[str], settings: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                arguments,
                env=clean_environment(settings),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def status(self) -> int | None:
        """As the shell has it, negative for a signal; None while it runs."""
        return self._child.poll()

    def signal(self, number: int) -> None:
        os.killpg(self._child.pid, number)

    def wait(self, seconds: float = 30) -> int:
        return self._child.wait(seconds)

    def kill(self) -> None:
        if self._child.poll() is None:
            self.signal(signal.SIGKILL)
            self._child.wait()

    def terminate(self, seconds: float = 60) -> int:
        if self._child.poll() is None:
            self.signal(signal.SIGTERM)
        return self._child.wait(seconds)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, words: str) -> None:
        """Return when it has said so; one that has ended never will."""
        eventually(lambda: words in self.output or self.status is not None, why=f"{words!r}")
        assert words in self.output, f"ended with status {self.status}: {self.output[-3000:]}"


WITHIN = 60.0
"""Seconds for what other processes bring about. The machine may be busy; whoever waits for it goes
on at once."""


def eventually(condition: Callable[[], Any], seconds: float = WITHIN, *, why: str = "") -> Any:
    """Wait for something that other processes bring about; the last value is in the failure."""
    deadline = time.monotonic() + seconds
    value = condition()
    while not value:
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {why or condition} (last: {value!r})")
        time.sleep(0.05)
        value = condition()
    return value


@contextmanager
def worker(
    settings: Mapping[str, str], folder: Path, name: str = "worker", *options: str
) -> Iterator[Process]:
    """A real worker, ready for messages; killed at the end if it still runs."""
    arguments = [*CELERY, "worker", "-n", f"{name}@test", "--without-gossip", "--without-mingle"]
    process = Process([*arguments, *options, "-l", "INFO"], settings, folder / f"{name}.log")
    try:
        process.says("ready.")
        yield process
    finally:
        process.kill()


@contextmanager
def beat(settings: Mapping[str, str], folder: Path, name: str = "beat") -> Iterator[Process]:
    process = Process([*CELERY, "beat", "-l", "INFO"], settings, folder / f"{name}.log")
    try:
        yield process
    finally:
        process.kill()
