"""Where `celery -A billing_worker` looks for the application. Importing it reads the settings."""

from __future__ import annotations

import sys

try:
    from billing_worker.entrypoints.worker.celery_app import app
except ImportError as error:
    # Celery would keep it to itself, and say that there is no application here.
    sys.exit(f"billing-worker cannot start. {error}")

__all__ = ["app"]
