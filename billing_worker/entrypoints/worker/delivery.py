"""Threads of the worker that send webhooks: one for each endpoint, with requests of its own.

A slow or dead endpoint keeps its own thread waiting, no other's and no charge's: the task that wakes
them returns at once.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.persistence.outbox import cursors
from billing_worker.persistence.store import CommitUnknown
from billing_worker.services.outbox.deliver import MOST_IN_FLIGHT, Outbound, deliver

REST_SECONDS: Final = 30.0
"""After a fault of ours with an endpoint, before it is tried again."""

log = structlog.get_logger()


class Deliveries:
    def __init__(self, out: Outbound) -> None:
        self._out = out
        self._guard = threading.Lock()
        self._awake: set[int] = set()
        self._leaving = threading.Event()

    def wake(self) -> int:
        """Start a thread for each endpoint that something is due for. Returns how many."""
        with self._out.store.reading() as connection:
            due = cursors.endpoints_due(connection, self._out.clock.now())
        return sum(self._start(endpoint_id) for endpoint_id in due)

    def leave(self) -> None:
        """Begin nothing more. What is on its way ends by its deadline, or is sent again."""
        self._leaving.set()

    def _start(self, endpoint_id: int) -> bool:
        with self._guard:
            if endpoint_id in self._awake or self._leaving.is_set():
                return False
            self._awake.add(endpoint_id)
        name = f"webhooks-{endpoint_id}"
        threading.Thread(target=self._run, args=(endpoint_id,), name=name, daemon=True).start()
        return True

    def _run(self, endpoint_id: int) -> None:
        try:
            with ThreadPoolExecutor(MOST_IN_FLIGHT, f"webhooks-{endpoint_id}") as threads:
                deliver(self._out, endpoint_id, threads, self._leaving.is_set)
        except (SQLAlchemyError, CommitUnknown) as error:
            log.error("database.unavailable", task="webhooks", reason=type(error).__name__)  # noqa: TRY400 - no traceback for an outage
        except Exception:
            log.exception("billing.alert", kind="webhooks.crashed", endpoint=endpoint_id)
            self._leaving.wait(REST_SECONDS)
        finally:
            with self._guard:
                self._awake.discard(endpoint_id)
