"""The errors that users cause or meet, each as one message with an exit status."""

from __future__ import annotations

from typing import NamedTuple

from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError, OperationalError

from billing_worker.config import BadSettings
from billing_worker.domain.errors import BillingError


class Trouble(NamedTuple):
    message: str
    status: int


def told(error: Exception) -> Trouble | None:
    """Return message and exit status, or None for our own bugs, which need a traceback."""
    if isinstance(error, BadSettings):
        return Trouble(str(error), 2)
    if isinstance(error, BillingError | OSError):
        return Trouble(f"Error: {error}", 1)
    if isinstance(error, RedisError):
        return Trouble(f"Error: Redis: {error}", 1)
    if isinstance(error, OperationalError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    ):
        return Trouble(f"Error: database: {str(error.orig).strip().splitlines()[0]}", 1)
    return None
