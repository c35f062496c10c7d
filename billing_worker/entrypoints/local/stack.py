"""The whole worker on one machine without installed services, for `demo` and `up`.

Embedded Redis, SQLite and the sandbox gateway replace whatever the settings leave out. Worker and
beat are the real ones, as child processes that end with this one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.fernet import Fernet

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import BillingError
from billing_worker.entrypoints.local.child_processes import (
    FolderInUseError,
    dying_with_us,
    only_for_us,
    private_file,
    sole_use_of,
    spawn_from_lasting_thread,
    write_owner,
)
from billing_worker.entrypoints.local.embedded_redis import EmbeddedRedis
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer

_CELERY = [sys.executable, "-m", "celery", "-A", "billing_worker"]
_QUIET_WORKER = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
_STOP_SECONDS = 60
"""A charge in flight ends within the deadlines of its calls; then the worker exits."""

_LOCK_SECONDS = 1.0
"""A killed predecessor is gone by then."""

PROVIDED = "provided"

_OF_THE_GATEWAY = {config.VARIABLE_PREFIX + name for name in config.GATEWAY if name != "TEST_MODE"}
"""All of them are given, or the sandbox replaces the gateway: credentials must not reach another
gateway.
"""


class LocalStack:
    """`with LocalStack(folder, environ) as stack:` runs everything inside the block.

    What `environ` sets is used as it is; the rest comes from `folder`. `sources` tells which is
    which: {variable: "environment", "file PATH" or PROVIDED}.

    Entering raises BillingError if another process has the folder, or if Redis cannot be started.
    """

    def __init__(
        self, folder: Path, environ: Mapping[str, str], *, behaviour: Behaviour | None = None
    ) -> None:
        self.folder = folder.absolute()
        self.environ = dict(environ)
        self.sources = config.sources(environ)
        self.sandbox: SandboxGateway | None = None
        self._behaviour = behaviour or Behaviour()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        only_for_us(self.folder)
        try:
            self._take_folder()
            self._provide()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop_children()
        self._open.close()

    def _take_folder(self) -> None:
        try:
            lock = self._open.enter_context(
                sole_use_of(self.folder / "in-use.lock", patience_seconds=_LOCK_SECONDS)
            )
        except FolderInUseError as used:
            raise BillingError(
                f"`demo` or `up` (pid {used.owner}) is running in {self.folder}: "
                "stop it, or choose another --folder"
            ) from None
        write_owner(lock, os.getpid())

    def _provide(self) -> None:
        if "BILLING_DATABASE_URL" not in self.sources:
            self._set("BILLING_DATABASE_URL", f"sqlite:///{self.folder / 'billing.db'}")
        if "BILLING_VAULT_KEYS" not in self.sources:
            self._set("BILLING_VAULT_KEYS_FILE", str(_vault_key_file(self.folder)))
        if "BILLING_REDIS_URL" not in self.sources:
            redis = self._open.enter_context(EmbeddedRedis(self.folder / "redis"))
            self._set("BILLING_REDIS_URL", redis.url)
            with private_file(self.folder / "redis.url") as file:
                file.write(redis.url.encode())
        if not _OF_THE_GATEWAY & self.sources.keys():
            self._provide_sandbox()

    def _set(self, variable: str, value: str) -> None:
        self.environ[variable] = value
        self.sources[variable.removesuffix("_FILE")] = PROVIDED

    def _provide_sandbox(self) -> None:
        self.sandbox = SandboxGateway(
            self._behaviour,
            SystemClock().now,
            first_number=int(SystemClock().now().timestamp()) * 1000,
        )
        server = self._open.enter_context(SandboxServer(self.sandbox))
        self._set("BILLING_GATEWAY_URL", f"{server.url}/api")
        self._set("BILLING_CARDGATE_URL", server.url)
        self._set("BILLING_GATEWAY_USERNAME", self.sandbox.username)
        self._set("BILLING_GATEWAY_PASSWORD", self.sandbox.password)
        if "BILLING_TEST_MODE" not in self.sources:
            self._set("BILLING_TEST_MODE", "true")

    def start_worker_and_beat(self) -> None:
        self._spawn("worker", [*_CELERY, "worker", *_QUIET_WORKER, "-l", "INFO"])
        self._spawn("beat", [*_CELERY, "beat", "-l", "INFO"])

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._children[name] = spawn_from_lasting_thread(
                dying_with_us(command),
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # this process passes Ctrl-C on, in order
            )

    def ended_children(self) -> dict[str, int]:
        """Return names and exit statuses of processes that should run and do not."""
        codes = {name: child.poll() for name, child in self._children.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def told(self, ended: Mapping[str, int]) -> str:
        """Return one line about `ended_children` that says where to look."""
        return "; ".join(
            f"{name} ended with status {status}, see {self.folder}/{name}.log"
            for name, status in ended.items()
        )

    def stop_children(self) -> None:
        """Stop beat first, so that nothing new starts. Each process finishes its charges in
        flight.
        """
        for name in ("beat", "worker"):
            child = self._children.pop(name, None)
            if child is None or child.poll() is not None:
                continue
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _vault_key_file(folder: Path) -> Path:
    """Return the folder's key file, created once: without it the stored card tokens are lost."""
    path = folder / "vault.key"
    if not path.exists():
        with private_file(path) as file:
            file.write(Fernet.generate_key())
    return path
