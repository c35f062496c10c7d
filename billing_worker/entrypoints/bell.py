from __future__ import annotations

from collections.abc import Sequence

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

SWEEPS = "billing.sweeps"
CHARGES = "billing.charges"
LOOKS = "billing.looks"

log = structlog.get_logger()


class CeleryBell:
    """Rings by message. A broker that is away costs time, never a charge: the sweep rings again."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def charge(self, invoice_ids: Sequence[int]) -> None:
        self._ring("billing.charge", invoice_ids, CHARGES)

    def look(self, attempt_ids: Sequence[int]) -> None:
        self._ring("billing.look", attempt_ids, LOOKS)

    def _ring(self, task: str, ids: Sequence[int], queue: str) -> None:
        try:
            self._app.send_task(task, args=[list(ids)], queue=queue)
        except OperationalError as error:
            log.warning("bell.broker_unreachable", task=task, reason=type(error).__name__)
