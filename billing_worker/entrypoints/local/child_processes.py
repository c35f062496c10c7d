"""Processes that live no longer than ours, and folders that one process at a time may use.

On Linux the kernel ends such a child with us, even when we are killed with SIGKILL. Elsewhere it
is best effort: they are ended when we end in an orderly way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO, Any

if sys.platform != "win32":  # which lacks it, and shall get as far as the clear error
    import fcntl

POLL_SECONDS = 0.005

# This short-lived interpreter turns into the child (same pid), so nothing lingers beside it.
# Not `preexec_fn`: that can deadlock in a process with threads, and warns since Python 3.12.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
parent, environment, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(parent):  # Otherwise the parent died before it could be watched.
    os.execve(command[0], command, os.environ if environment == "ours" else {})
"""


def dying_with_us(command: Sequence[str], *, without_environment: bool = False) -> list[str]:
    """`command`, started so that it dies with us; command[0] is a path. Start it with `spawn`.

    `without_environment` is for strangers: ours holds secrets.
    """
    if sys.platform != "linux":
        return list(command)
    environment = "none" if without_environment else "ours"
    ours = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), environment]
    return [*ours, *command]


def spawn_from_lasting_thread(
    command: Sequence[str], **popen_options: Any
) -> subprocess.Popen[bytes]:
    """Start a child whose parent-death signal means the death of our process.

    The kernel sends that signal when the *thread* that started the child ends. So the child is
    started by a thread which stays for as long as the child does, whoever called us.
    """
    spawned: Future[subprocess.Popen[bytes]] = Future()

    def spawn_and_stay() -> None:
        try:
            process = subprocess.Popen(command, **popen_options)  # noqa: S603 - Our own command.
        except BaseException as error:  # noqa: BLE001 - It is raised again in the caller's thread.
            spawned.set_exception(error)
            return
        spawned.set_result(process)
        process.wait()

    Thread(target=spawn_and_stay, name=f"parent of {command[0]}", daemon=True).start()
    return spawned.result()


class FolderInUseError(Exception):
    """Another process has the lock; `owner` is its pid as it wrote it down, or "unknown"."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


@contextmanager
def sole_use_of(lock_file: Path, *, patience_seconds: float) -> Iterator[IO[str]]:
    """Hold the lock of `lock_file`, waiting for a predecessor that is on its way out.

    The lock belongs to the open file: it lasts as long as the longest of us and of the children
    that inherit that file, even one that was orphaned. Raises FolderInUseError.
    """
    with lock_file.open("a+") as file:
        if not any(_try_to_lock(file) for _ in polls(patience_seconds)):
            file.seek(0)
            raise FolderInUseError(file.read().strip() or "unknown")
        yield file


def write_owner(lock_file: IO[str], pid: int) -> None:
    lock_file.truncate(0)
    lock_file.write(str(pid))
    lock_file.flush()


def polls(seconds: float) -> Iterator[None]:
    """Come back every few milliseconds, for so long; at least once."""
    deadline = time.monotonic() + seconds
    yield
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        yield


def _try_to_lock(lock_file: IO[str]) -> bool:
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
