"""The tasks: each takes ids and makes one service call. A task that needs an `if` is a service."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.entrypoints.worker.celery_app import app, process
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.persistence.store import CommitUnknown
from billing_worker.services.cards.expiry import warn_expiring
from billing_worker.services.charging.charge import charge_batch, charge_on_probation
from billing_worker.services.charging.reconcile import poll_batch, reconcile_due
from billing_worker.services.commands.records import TASKS
from billing_worker.services.doorbell import ring_due
from billing_worker.services.dunning import give_up_overdue
from billing_worker.services.guards.lost_memory import clock_is_wrong
from billing_worker.services.hosted_pages.poll import poll_due_pages
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.monitoring.inspection import inspect
from billing_worker.services.monitoring.silence import record_run
from billing_worker.services.notices.announce import announce
from billing_worker.services.outbox.retention import forget
from billing_worker.services.outbox.sweep import tell

log = structlog.get_logger()


def task(name: str, *, by_the_clock: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Register a task that a database outage ends with one log line. The next sweep does its work.

    `by_the_clock`: the task does nothing while the clock is wrong, because it dates and voids by
    it.
    """

    def decorate(work: Callable[..., Any]) -> Any:
        @wraps(work)
        def run(*args: Any) -> None:
            try:
                if by_the_clock and clock_is_wrong(process.ports()):
                    return
                done = work(*args)
            except (SQLAlchemyError, CommitUnknown) as error:
                log.error("database.unavailable", task=name, reason=type(error).__name__)  # noqa: TRY400 - no traceback for an outage
            else:
                if done:
                    log.info("task.done", task=name, result=done)

        return app.task(name=name)(run)

    return decorate


def sweep(name: str, *, by_the_clock: bool = True) -> Callable[[Callable[[], Any]], Any]:
    """Register a task of the beat, which also records that it has finished."""

    def decorate(work: Callable[[], Any]) -> Any:
        @task(name, by_the_clock=by_the_clock)
        @wraps(work)
        def run() -> Any:
            done = work()
            record_run(process.ports(), name)
            return done

        return run

    return decorate


def _pass_on(name: str) -> Any:
    """Pass a command on to its own queue, from which it cannot be lost, if it came through
    another.
    """

    @app.task(name=name, bind=True)
    def pass_on(self: Any, /, *args: Any, **kwargs: Any) -> None:
        request = self.request
        app.send_task(
            name, args, kwargs, task_id=request.id, ignore_result=request.ignore_result is True
        )

    return pass_on


for _name in TASKS:
    _pass_on(_name)


@sweep("billing.renew")
def renew() -> int:
    return renew_due(process.ports())


@sweep("billing.ring")
def ring() -> int:
    charge_on_probation(process.ports())
    return ring_due(process.ports())


@sweep("billing.reconcile")
def reconcile() -> int:
    return reconcile_due(process.ports())


@sweep("billing.card_pages")
def card_pages() -> int:
    return poll_due_pages(process.ports())


@sweep("billing.give_up")
def give_up() -> int:
    ports = process.ports()
    return give_up_overdue(ports.store, ports.clock)


@sweep("billing.warn_expiring")
def warn_of_expiring_cards() -> int:
    ports = process.ports()
    return warn_expiring(ports.store, ports.clock)


@sweep("billing.announce")
def announce_charges() -> int:
    ports = process.ports()
    return announce(ports.store, ports.clock, ports.timings.notices)


@sweep("billing.publish", by_the_clock=False)
def publish_events() -> int:
    return tell(process.ports(), process.deliveries().wake, process.events_queue())


@sweep("billing.invariants")
def invariants() -> int:
    return inspect(process.ports(), intervals(process.settings))


@sweep("billing.forget_events")
def forget_events() -> int:
    ports = process.ports()
    return forget(ports.store, ports.clock, process.settings.events_kept)


@task("billing.charge", by_the_clock=False)  # the claim compares the clock, once for all charges
def charge(invoice_ids: list[int]) -> dict[str, int]:
    return charge_batch(process.ports(), invoice_ids)


@task("billing.look")
def poll(attempt_ids: list[int]) -> dict[str, int]:
    return poll_batch(process.ports(), attempt_ids)
