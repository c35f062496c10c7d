"""A recurring billing worker: never charged twice, never lost, unknown never called failed."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`celery -A billing_worker` looks for `app`: made on demand, so that importing the package
    needs neither settings nor Celery.
    """
    if name in {"app", "celery"}:
        from billing_worker.entrypoints.worker.celery_app import app  # noqa: PLC0415 - on demand

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
