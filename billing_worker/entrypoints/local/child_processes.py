"""Child processes that end with this one, and folders that one process at a time may use.

On Linux the kernel ends such a child with its parent, even after SIGKILL. Elsewhere children are
ended only at an orderly exit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO, Any

from billing_worker.domain.errors import BillingError

if sys.platform != "win32":  # which lacks it, and shall get as far as the clear error
    import fcntl

POLL_SECONDS = 0.005
_KILLED_SECONDS = 5.0

# This short-lived interpreter becomes the child (same pid), so no extra process remains.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
parent, environment, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(parent):  # Otherwise the parent died before it could be watched.
    os.execve(command[0], command, os.environ if environment == "ours" else {})
"""


def dying_with_us(command: Sequence[str], *, without_environment: bool = False) -> list[str]:
    """Return `command` in a form that ends with this process. Start it with `spawn`.

    command[0] is a path. `without_environment` is for foreign programs: our environment holds
    secrets.
    """
    if sys.platform != "linux":
        return list(command)
    environment = "none" if without_environment else "ours"
    ours = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), environment]
    return [*ours, *command]


def spawn_from_lasting_thread(
    command: Sequence[str], **popen_options: Any
) -> subprocess.Popen[bytes]:
    """Start a child that receives the parent-death signal only at the end of this process.

    The kernel sends that signal when the *thread* that started the child ends. So a thread that
    lives as long as the child starts it.
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
    """Another process holds the lock. `owner` is its pid as written in the file, or "unknown"."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


@contextmanager
def sole_use_of(lock_file: Path, *, patience_seconds: float) -> Iterator[IO[str]]:
    """Hold the lock of `lock_file`; wait for a predecessor that is ending.

    The lock belongs to the open file. Children inherit it, so it lasts until the last of them ends.
    Raises FolderInUseError.
    """
    # Not through a symbolic link: it could lead to a file of ours that is then overwritten.
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+") as file:
        if not any(_try_to_lock(file) for _ in polls(patience_seconds)):
            file.seek(0)
            raise FolderInUseError(file.read().strip() or "unknown")
        yield file


def only_for_us(folder: Path) -> None:
    """Make the folder, or close it to other users. Raises BillingError if it is another user's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise BillingError(f"the folder {folder} belongs to another user: choose another one")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


@contextmanager
def private_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that only we can read. It is complete or does not exist."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file
    new.rename(path)  # atomic


def write_owner(lock_file: IO[str], pid: int) -> None:
    lock_file.seek(0)
    lock_file.truncate()
    lock_file.write(str(pid))
    lock_file.flush()


def polls(seconds: float) -> Iterator[None]:
    """Yield every few milliseconds for this long, at least once."""
    deadline = time.monotonic() + seconds
    yield
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        yield


def comes_up(
    process: subprocess.Popen[bytes], is_ready: Callable[[], bool], patience_seconds: float
) -> bool:
    """Return whether the server is ready in time. After False or Ctrl-C no process is left."""
    try:
        for _ in polls(patience_seconds):
            if is_ready():
                return True
            if process.poll() is not None:
                return False
    except BaseException:
        _kill(process)
        raise
    _kill(process)
    return False


def end(process: subprocess.Popen[bytes], by: signal.Signals, patience_seconds: float) -> None:
    """Ask a process to end, and kill it if it does not end in time."""
    process.send_signal(by)
    try:
        process.wait(patience_seconds)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(_KILLED_SECONDS)


def _try_to_lock(lock_file: IO[str]) -> bool:
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
