"""Threads of the worker that take commands from their queue, and the step that starts them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import structlog
from celery import Celery, bootsteps
from redis import Redis
from redis.exceptions import RedisError

from billing_worker.clock import SystemClock
from billing_worker.config import Settings
from billing_worker.entrypoints.worker.command_message import read
from billing_worker.entrypoints.worker.command_queue import CommandQueue, Taken
from billing_worker.entrypoints.worker.doorbell import COMMANDS
from billing_worker.services.commands.execute import NotKept, carry_out
from billing_worker.services.commands.order import Subject, subject_of
from billing_worker.services.ports import Ports

THREADS = 4
"""A command that asks the gateway may take a minute; the others must not wait for it."""

WAIT_SECONDS = 1.0
PAUSE_SECONDS = 1.0
"""Between two tries while Redis or the database is away."""

log = structlog.get_logger()

Reply = Callable[[str, dict[str, Any]], None]
"""Leaves an answer for whoever sent the message with this id."""


def subject_of_message(raw: bytes) -> Subject:
    message = read(raw, SystemClock().now()).message
    return subject_of(message.task, message.arguments)


class Intake:
    def __init__(self, queue: CommandQueue, ports: Callable[[], Ports], reply: Reply) -> None:
        self._queue = queue
        self._ports = ports
        self._reply = reply
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"commands-{number}", daemon=True)
            for number in range(THREADS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Begin nothing more, and wait for what is in hand."""
        self._leaving.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self) -> None:
        while not self._leaving.is_set():
            try:
                taken = self._queue.take(WAIT_SECONDS, self._leaving)
                if taken is not None:
                    self._handle(taken)
            except RedisError as error:
                log.warning("commands.queue_unreachable", reason=type(error).__name__)
                self._leaving.wait(PAUSE_SECONDS)
            except Exception:
                # Our bug. The message stays in the queue, and its lease keeps it from spinning.
                log.exception("billing.alert", kind="command.crashed")
                self._leaving.wait(PAUSE_SECONDS)

    def _handle(self, taken: Taken) -> None:
        envelope = read(taken.raw, SystemClock().now())
        message = envelope.message
        try:
            answer = carry_out(self._ports(), message)
        except NotKept as error:
            log.warning("command.waits", task=message.task, id=message.id, reason=str(error))
            self._queue.give_back(taken)
            self._leaving.wait(PAUSE_SECONDS)
            return
        log.info("command.answered", task=message.task, id=message.id, status=answer.status)
        if message.id is not None and envelope.wants_answer:
            self._reply(message.id, answer.as_json())
        self._queue.done(taken)


def takes_commands(settings: Settings, ports: Callable[[], Ports]) -> type[bootsteps.StartStopStep]:
    """The step of a worker that carries commands out. Celery makes it by itself and gives it
    nothing, so its class must know the ports.
    """

    class TakesCommands(bootsteps.StartStopStep):
        """Reads the commands queue instead of Celery's consumer (see `command_message`).

        `-Q` and `-X` mean what they always mean: without the queue there are no threads.
        """

        requires = ("celery.worker.components:Pool",)

        def __init__(self, worker: Any, **options: Any) -> None:
            super().__init__(worker, **options)
            queues = worker.app.amqp.queues
            self.enabled = COMMANDS in queues.consume_from
            queues.deselect(COMMANDS)
            queue = CommandQueue(_client(settings), COMMANDS, subject_of_message)
            self._intake = Intake(queue, ports, _reply_through(worker.app))

        def start(self, worker: Any) -> None:
            self._intake.start()

        def stop(self, worker: Any) -> None:
            self._intake.leave()

        def terminate(self, worker: Any) -> None:
            self.stop(worker)

    return TakesCommands


def _client(settings: Settings) -> Redis:
    return Redis.from_url(
        settings.redis_url,
        socket_timeout=WAIT_SECONDS + 5,
        socket_connect_timeout=3,
        socket_keepalive=True,
        health_check_interval=5,
    )


def _reply_through(app: Celery) -> Reply:
    def reply(message_id: str, answer: dict[str, Any]) -> None:
        try:
            app.backend.store_result(message_id, answer, "SUCCESS")
        except RedisError as error:
            # The row says what became of it; the caller asks again or sends it again.
            log.warning("command.answer_lost", id=message_id, reason=type(error).__name__)

    return reply
