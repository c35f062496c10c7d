"""The Celery application: its settings with their reasons, its beat schedule, its process life.

Celery messages are only wake-ups here. The Redis transport loses and repeats messages, so every
task may run twice, late or never. The periodic sweeps find what was missed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any

import structlog
from celery import Celery, bootsteps, signals
from kombu import Queue

from billing_worker import bootstrap, logs
from billing_worker.broker import OwnBroker
from billing_worker.config import BadSettings, Settings, load
from billing_worker.entrypoints.book_checks import why_nothing_is_sold
from billing_worker.entrypoints.worker.command_consumer import takes_commands
from billing_worker.entrypoints.worker.delivery import Deliveries
from billing_worker.entrypoints.worker.doorbell import (
    CHARGES,
    COMMANDS,
    POLLS,
    SWEEPS,
    TRANSPORT_OPTIONS,
    WEBHOOKS,
    CeleryBell,
    EventsQueue,
    doorbell_only,
)
from billing_worker.entrypoints.worker.strict_transport import use_strict_transport
from billing_worker.entrypoints.worker.sweeps import TELL, intervals
from billing_worker.metering import PrometheusMeter
from billing_worker.services.charging.thread_pool import ThreadPool
from billing_worker.services.charging.vault_keys import try_at_start
from billing_worker.services.commands.records import TASKS as COMMAND_TASKS
from billing_worker.services.doorbell import IDS_IN_A_MESSAGE
from billing_worker.services.outbox.relay import Send
from billing_worker.services.ports import Bell, Ports

FREE_THREADS_EVERY_SECONDS = 0.05

TICKS_LIVE_FOR = 3
"""A beat message older than three intervals is useless: newer ones follow it."""


use_strict_transport()


def _settings_or_exit() -> Settings:
    try:
        return load(os.environ)
    except BadSettings as error:
        sys.stderr.write(f"billing-worker cannot start. {error}\n")
        sys.exit(2)


def make_app(settings: Settings) -> Celery:
    app = OwnBroker(
        "billing_worker",
        broker=settings.redis_url,
        results=settings.redis_url,
        include=["billing_worker.entrypoints.worker.tasks"],
    )
    app.conf.update(
        # Redis holds no state of record. A command's answer there is a copy of its row, kept as
        # long as a caller may wait. No other task leaves a result.
        result_backend_transport_options={"retry_policy": {"max_retries": 1}},
        result_expires=3600,
        redis_socket_timeout=5,
        redis_socket_connect_timeout=3,
        task_ignore_result=True,
        # Messages hold ids only: a forged one cannot change what is charged.
        task_serializer="json",
        accept_content=["json"],
        timezone="UTC",
        enable_utc=True,
        # Late acknowledgement repeats tasks, and 5.7 workers exit when the broker connection
        # breaks.
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_eta_task_limit=100,
        # A charge in progress must finish.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # The sweep publishes again, and a caller must not wait for a dead broker.
        task_publish_retry=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=TRANSPORT_OPTIONS,
        task_default_queue=SWEEPS,
        task_queues=[Queue(SWEEPS), Queue(CHARGES), Queue(POLLS), Queue(WEBHOOKS), Queue(COMMANDS)],
        task_routes={name: {"queue": COMMANDS} for name in COMMAND_TASKS},
        task_create_missing_queues=False,
        # Threads ignore time limits. Every call has its own deadline instead.
        task_time_limit=None,
        task_soft_time_limit=None,
        worker_pool="threads",
        worker_concurrency=_pages_at_once(settings),
        worker_send_task_events=False,
        # Whoever writes to Redis could stop the consumers or the worker, and read what it runs.
        worker_enable_remote_control=False,
        worker_soft_shutdown_timeout=0,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # Only intervals: a missed or repeated message changes nothing, because the rows say what is
        # due.
        beat_schedule=_beat_table(settings),
        # In memory: the usual file is a pickle, and whoever plants one runs code as the beat's
        # user.
        beat_scheduler="celery.beat:Scheduler",
        beat_max_loop_interval=5,
    )
    app.steps["consumer"].add(LooksForFreeThreads)
    return app


class LooksForFreeThreads(bootsteps.StartStopStep):
    """Wakes the consumer often enough to fetch the next batch as soon as a thread is free.

    With prefetching disabled a full worker stops polling, and nothing tells its event loop that a
    thread has become free. It then polls up to a second later, which cost a third of all charges.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, c: Any) -> None:
        if c.hub is not None:
            c.hub.call_repeatedly(FREE_THREADS_EVERY_SECONDS, lambda: None)


def _pages_at_once(settings: Settings) -> int:
    """Return how many batches a worker takes: twice what fills its threads. While one batch waits
    for its last charges, the next one begins.

    With more, one worker holds batches while another one is idle.
    """
    return 2 * -(-settings.charge_concurrency // IDS_IN_A_MESSAGE)


def _beat_table(settings: Settings) -> dict[str, dict[str, Any]]:
    return {
        sweep: {
            "task": sweep,
            "schedule": float(seconds),
            "options": {
                "queue": WEBHOOKS if sweep == TELL else SWEEPS,
                "expires": seconds * TICKS_LIVE_FOR,
            },
        }
        for sweep, seconds in intervals(settings).items()
    }


class _Process:
    """The ports of this process, built at first use: after a fork, never before."""

    def __init__(self, settings: Settings, bell: Bell) -> None:
        self.settings = settings
        self._bell = bell
        self._lock = threading.Lock()
        self._built: tuple[Ports, ThreadPool] | None = None
        self._deliveries: Deliveries | None = None
        self._events_queue: EventsQueue | None = None
        self._keys_were_tried = False

    def ports(self) -> Ports:
        with self._lock:
            if self._built is None:
                self._built = bootstrap.build_ports(self.settings, self._bell)
            if not self._keys_were_tried:
                self._keys_were_tried = try_at_start(self._built[0])
            return self._built[0]

    def deliveries(self) -> Deliveries:
        """With a store of their own: they take no connection that a charge needs."""
        with self._lock:
            if self._deliveries is None:
                store = bootstrap.build_store(self.settings)
                self._deliveries = Deliveries(bootstrap.build_outbound(self.settings, store))
            return self._deliveries

    def events_queue(self) -> Send | None:
        """Where BILLING_EVENTS_QUEUE sends events, through an application that may use any queue."""
        with self._lock:
            if self._events_queue is None and self.settings.events_queue:
                sender = doorbell_only(self.settings.redis_url)
                self._events_queue = EventsQueue(sender, self.settings.events_queue)
            return self._events_queue

    def leave(self) -> None:
        with self._lock:
            if self._built is not None:
                self._built[1].leave()
            if self._deliveries is not None:
                self._deliveries.leave()


settings = _settings_or_exit()
app = make_app(settings)
process = _Process(settings, CeleryBell(app))
app.steps["worker"].add(takes_commands(settings, process.ports))


@signals.setup_logging.connect
def _configure_logs(**_: Any) -> None:
    logs.configure()
    # Celery's own lines about each task repeat what our events say.
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)
    logging.getLogger("celery.app.trace").setLevel(logging.WARNING)
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_hide_body)


_TELL_THE_BODY = (
    "Received unregistered task",
    "Received invalid task",
    "Received and deleted unknown",
    "Can't decode message body",
)


def _hide_body(record: logging.LogRecord) -> bool:
    """Celery logs a rejected message with its whole body, which may hold a card token."""
    if str(record.msg).startswith(_TELL_THE_BODY):
        record.msg, record.args, record.exc_info = "celery.message_refused", (), None
    return True


@signals.worker_ready.connect
def _try_the_keys(**_: Any) -> None:
    process.ports()


@signals.worker_ready.connect
def _say_why_nothing_is_sold(**_: Any) -> None:
    """Log at start, not only when a charge is due. The claim checks it in any case."""
    if why := why_nothing_is_sold(settings):
        structlog.get_logger().error("billing.alert", kind="book.refused", reason=why)


@signals.worker_ready.connect
def _serve_metrics(**_: Any) -> None:
    """A port that is taken costs the figures and no charge."""
    meter = process.ports().meter
    if isinstance(meter, PrometheusMeter):
        try:
            meter.serve(settings.metrics_host, settings.metrics_port or 0)
        except OSError as error:
            structlog.get_logger().error("metrics.not_served", reason=str(error))


@signals.worker_shutting_down.connect
def _begin_no_more(**_: Any) -> None:
    process.leave()
