from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

from billing_worker.broker import OwnBroker

TRANSPORT_OPTIONS = {
    # Without a timeout a half-open connection hangs a process for ever, without a log line.
    "socket_timeout": 5,
    "socket_connect_timeout": 3,
    "socket_keepalive": True,
    "health_check_interval": 5,
    "visibility_timeout": 3600,
    "max_connections": 100,
    "retry_on_timeout": False,  # otherwise a push may be sent twice
}

SWEEPS = "billing.sweeps"
CHARGES = "billing.charges"
POLLS = "billing.looks"
WEBHOOKS = "billing.webhooks"
COMMANDS = "billing.commands"  # written by other services

log = structlog.get_logger()


def doorbell_only(redis_url: str) -> Celery:
    """Return a Celery application that only sends messages: for processes without a worker's
    settings.
    """
    app = OwnBroker("billing_worker", broker=redis_url, results=None, set_as_current=False)
    app.conf.update(
        broker_transport_options=TRANSPORT_OPTIONS,
        task_publish_retry=False,
        task_serializer="json",
        task_ignore_result=True,
    )
    return app


class SilentBell:
    """Sends nothing: for commands on the command line. The sweeps find what they cause."""

    def charge(self, invoice_ids: Sequence[int]) -> None:
        pass

    def poll(self, attempt_ids: Sequence[int]) -> None:
        pass


class CeleryBell:
    """Wakes workers by Celery messages. Without a broker charges are late, never lost: the sweep
    sends again.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app

    def charge(self, invoice_ids: Sequence[int]) -> None:
        self._ring("billing.charge", invoice_ids, CHARGES)

    def poll(self, attempt_ids: Sequence[int]) -> None:
        self._ring("billing.look", attempt_ids, POLLS)

    def _ring(self, task: str, ids: Sequence[int], queue: str) -> None:
        try:
            self._app.send_task(task, args=[list(ids)], queue=queue)
        except OperationalError as error:
            log.warning("bell.broker_unreachable", task=task, reason=type(error).__name__)


EVENT = "billing.event"
"""The task of other systems that takes one public event."""


class EventsQueue:
    """Sends public events to a queue of other systems. The task's id is the event's."""

    def __init__(self, app: Celery, queue: str) -> None:
        self._app = app
        self._queue = queue

    def __call__(self, event: dict[str, Any]) -> bool:
        """False: the broker is away, and the event is sent again later."""
        try:
            self._app.send_task(EVENT, args=[event], queue=self._queue, task_id=event["id"])
        except OperationalError as error:
            log.warning("events.broker_unreachable", reason=type(error).__name__)
            return False
        return True
