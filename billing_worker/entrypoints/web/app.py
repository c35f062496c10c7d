"""The web application: callbacks, pay pages and health checks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

from flask import Flask, Response, jsonify
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from billing_worker import bootstrap
from billing_worker.config import Settings
from billing_worker.domain.errors import BillingError
from billing_worker.entrypoints.checks import (
    SweepsSilent,
    check_database,
    check_redis,
    check_sweeps,
)
from billing_worker.entrypoints.web.api import api_routes
from billing_worker.entrypoints.web.callbacks import callback_routes
from billing_worker.entrypoints.web.metrics import metrics_routes
from billing_worker.entrypoints.web.patience import PATIENCE_SECONDS, Patient
from billing_worker.entrypoints.web.pay_page import pay_routes
from billing_worker.entrypoints.worker.doorbell import CeleryBell, doorbell_only
from billing_worker.entrypoints.worker.queue_depths import queue_depths
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.services.monitoring.silence import allowed_ages


def create_app(settings: Settings) -> Flask:
    app = Flask("billing_worker")

    @app.get("/health/live")
    def live() -> Response:
        """Answer that this process lives. Other services do not count: a restart of this one does
        not help them.
        """
        return jsonify(live=True)

    parts: dict[str, Callable[[Settings], str]] = {
        "database": check_database,
        "redis": check_redis,
        "sweeps": lambda settings: check_sweeps(settings, settings.timings.silence),
        "callbacks": _callbacks,
    }
    asked = {part: Patient(partial(check, settings)) for part, check in parts.items()}

    @app.get("/health/ready")
    def ready() -> tuple[Response, int]:
        """Answer whether the database has this version's schema, Redis answers and sweeps run.

        Callbacks may be off: sweeps do the same work later.
        """
        under_way = {part: one.begin() for part, one in asked.items()}
        wait(under_way.values(), PATIENCE_SECONDS)
        troubles = {part: trouble for part, one in under_way.items() if (trouble := _trouble(one))}
        state = {part: troubles.get(part) or one.result() for part, one in under_way.items()}
        return jsonify(ready=not troubles, **state), 503 if troubles else 200

    bell = CeleryBell(doorbell_only(settings.redis_url))
    inbox = bootstrap.build_inbox(settings, bell)
    app.register_blueprint(callback_routes(inbox))
    depths = queue_depths(settings.redis_url)
    ages = allowed_ages(intervals(settings), settings.timings.silence)
    app.register_blueprint(
        metrics_routes(inbox.store, inbox.clock, depths, ages, settings.api_tokens)
    )
    app.register_blueprint(pay_routes(inbox.store, inbox.vault))
    app.register_blueprint(api_routes(inbox.store, settings.api_tokens))
    return app


def _trouble(asked: Future[str]) -> str | None:
    """Return why a part is not ready, in one sentence, or None."""
    if not asked.done():
        return "not ready: no answer within two seconds"
    error = asked.exception()
    match error:
        case None:
            return None
        case SweepsSilent():
            return f"not ready: {error}"
        case SQLAlchemyError() | RedisError() | BillingError():
            return f"not ready: {type(error).__name__}"
        case _:
            raise error


def _callbacks(settings: Settings) -> str:
    if settings.callback_secret.reveal():
        return "on"
    return "off: BILLING_CALLBACK_SECRET is not set"
