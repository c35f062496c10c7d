"""The tasks: each a few lines, ids in, one service call. If it needs an `if`, it is a service."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.entrypoints.celery_app import app, process
from billing_worker.persistence.store import CommitUnknown
from billing_worker.services.charge import charge_page
from billing_worker.services.reconcile import look_page
from billing_worker.services.renew import renew_due
from billing_worker.services.ring import look_due, ring_due

log = structlog.get_logger()


def task(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A task that a database outage ends with one line of log: the next sweep does its work."""

    def decorate(work: Callable[..., Any]) -> Any:
        @wraps(work)
        def run(*args: Any) -> None:
            try:
                done = work(*args)
            except (SQLAlchemyError, CommitUnknown) as error:
                log.error("database.unavailable", task=name, reason=type(error).__name__)  # noqa: TRY400 - no traceback for an outage
            else:
                if done:
                    log.info("task.done", task=name, result=done)

        return app.task(name=name)(run)

    return decorate


@task("billing.renew")
def renew() -> int:
    return renew_due(process.ports())


@task("billing.ring")
def ring() -> int:
    return ring_due(process.ports())


@task("billing.reconcile")
def reconcile() -> int:
    return look_due(process.ports())


@task("billing.charge")
def charge(invoice_ids: list[int]) -> dict[str, int]:
    return charge_page(process.ports(), invoice_ids)


@task("billing.look")
def look(attempt_ids: list[int]) -> dict[str, int]:
    return look_page(process.ports(), attempt_ids)
