"""Celery applications that use the broker they are given."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Connection

from billing_worker.redis_url import verified


class OwnBroker(Celery):
    """Celery with this broker and this result backend, and no other.

    Celery prefers `CELERY_BROKER_URL` and `CELERY_RESULT_BACKEND` of the environment to what an
    application configures. Another service's variables would then receive our commands, card tokens
    among them.
    """

    def __init__(
        self, name: str, *, broker: str | None, results: str | None, **options: Any
    ) -> None:
        broker, results = broker and verified(broker), results and verified(results)
        self._broker = broker
        super().__init__(name, **options)
        self.conf.update(broker_url=broker, result_backend=results)
        self.backend_cls = results or "disabled"

    def connection_for_read(self, url: str | None = None, **options: Any) -> Connection:
        return super().connection_for_read(url or self._broker, **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Connection:
        return super().connection_for_write(url or self._broker, **options)
