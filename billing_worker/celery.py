"""Where `celery -A billing_worker` looks for the application. Importing it reads the settings."""

from billing_worker.entrypoints.worker.celery_app import app

__all__ = ["app"]
