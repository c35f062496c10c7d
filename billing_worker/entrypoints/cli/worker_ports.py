"""The worker's ports, for commands that call the gateway themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from billing_worker.bootstrap import build_ports
from billing_worker.config import DATABASE, GATEWAY, VAULT, Settings
from billing_worker.entrypoints.cli.shared import open_store, settings_for
from billing_worker.entrypoints.cli.vault_keys import require_keys
from billing_worker.entrypoints.worker.doorbell import SilentBell
from billing_worker.services.ports import Ports


@contextmanager
def open_ports(*needs: str) -> Iterator[tuple[Ports, Settings]]:
    """Yield all ports of a use case that calls the gateway. Its doorbell wakes no worker."""
    # Alerts go to standard error: standard output is read by programs too.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    settings = settings_for(*DATABASE, *GATEWAY, *VAULT, *needs)
    # Raises in words if the database cannot be used, or the clock is wrong.
    open_store(settings, decides=True).close()
    ports, _ = build_ports(settings, SilentBell())
    with ports.store:
        require_keys(ports.store, ports.vault)
        yield ports, settings
