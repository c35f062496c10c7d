"""The web application. In this version: health, for whoever restarts processes."""

from __future__ import annotations

from flask import Flask, Response, jsonify
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.config import Settings
from billing_worker.domain.errors import BillingError
from billing_worker.entrypoints.checks import check_database, check_redis


def create_app(settings: Settings) -> Flask:
    app = Flask("billing_worker")

    @app.get("/health/live")
    def live() -> Response:
        """This process answers. Says nothing about its neighbours: a restart would not help them."""
        return jsonify(live=True)

    @app.get("/health/ready")
    def ready() -> tuple[Response, int]:
        """Database at this version's schema, Redis answering."""
        parts = {"database": check_database, "redis": check_redis}
        state: dict[str, str] = {}
        ok = True
        for part, check in parts.items():
            try:
                state[part] = check(settings)
            except (SQLAlchemyError, RedisError, BillingError) as error:
                ok = False
                state[part] = f"not ready: {type(error).__name__}"
        return jsonify(ready=ok, **state), 200 if ok else 503

    return app
