"""The web application: callbacks, pay pages and health checks."""

from __future__ import annotations

from collections.abc import Callable

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
from billing_worker.entrypoints.web.pay_page import pay_routes
from billing_worker.entrypoints.worker.doorbell import CeleryBell, doorbell_only
from billing_worker.entrypoints.worker.queue_depths import queue_depths


def create_app(settings: Settings) -> Flask:
    app = Flask("billing_worker")

    @app.get("/health/live")
    def live() -> Response:
        """Answer that this process lives. Other services do not count: a restart of this one does
        not help them.
        """
        return jsonify(live=True)

    @app.get("/health/ready")
    def ready() -> tuple[Response, int]:
        """Answer whether the database has this version's schema, Redis answers and sweeps run.

        Callbacks may be off: sweeps do the same work later.
        """
        parts: dict[str, Callable[[Settings], str]] = {
            "database": check_database,
            "redis": check_redis,
            "sweeps": lambda settings: check_sweeps(settings, settings.timings.silence),
            "callbacks": _callbacks,
        }
        state: dict[str, str] = {}
        ok = True
        for part, check in parts.items():
            try:
                state[part] = check(settings)
            except SweepsSilent as error:
                ok = False
                state[part] = f"not ready: {error}"
            except (SQLAlchemyError, RedisError, BillingError) as error:
                ok = False
                state[part] = f"not ready: {type(error).__name__}"
        return jsonify(ready=ok, **state), 200 if ok else 503

    bell = CeleryBell(doorbell_only(settings.redis_url))
    inbox = bootstrap.build_inbox(settings, bell)
    app.register_blueprint(callback_routes(inbox))
    depths = queue_depths(settings.redis_url)
    app.register_blueprint(metrics_routes(inbox.store, inbox.clock, depths, settings.api_tokens))
    app.register_blueprint(pay_routes(inbox.store, inbox.vault))
    app.register_blueprint(api_routes(inbox.store, settings.api_tokens))
    return app


def _callbacks(settings: Settings) -> str:
    if settings.callback_secret.reveal():
        return "on"
    return "off: BILLING_CALLBACK_SECRET is not set"
