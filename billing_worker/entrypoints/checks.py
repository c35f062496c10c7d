"""Is every part that the worker needs there, and does it answer as it should?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.bootstrap import build_gateway, build_store
from billing_worker.config import Settings
from billing_worker.domain.errors import BillingError
from billing_worker.gateway.port import CallLog
from billing_worker.persistence.migrate import current_revision, newest_revision

NO_SUCH_REFERENCE = "billing-worker-check"


@dataclass(frozen=True, slots=True)
class Check:
    part: str
    ok: bool
    details: str


def run_checks(settings: Settings) -> list[Check]:
    parts: dict[str, Callable[[Settings], str]] = {
        "database": check_database,
        "redis": check_redis,
        "gateway": _gateway,
    }
    return [_checked(part, check, settings) for part, check in parts.items()]


def _checked(part: str, check: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(part, ok=True, details=check(settings))
    except (SQLAlchemyError, RedisError) as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()
        return Check(part, ok=False, details=f"unreachable: {cause[0] if cause else '?'}")
    except BillingError as error:
        return Check(part, ok=False, details=str(error))


def check_database(settings: Settings) -> str:
    """Raises SQLAlchemyError when unreachable, BillingError when not at this version's schema."""
    with build_store(settings) as store, store.reading() as connection:
        revision = current_revision(connection)
    if revision != newest_revision():
        raise BillingError(f"schema is {revision or 'missing'}: run `billing-worker migrate`")
    return f"{store.engine.dialect.name}, schema {revision}"


def check_redis(settings: Settings) -> str:
    """Raises RedisError when unreachable."""
    with Redis.from_url(settings.redis_url, socket_timeout=3, socket_connect_timeout=3) as client:
        client.ping()
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy")
    if policy not in {None, "noeviction"}:
        return f"answers, but maxmemory-policy is {policy}: a queue needs noeviction"
    return "answers"


def _gateway(settings: Settings) -> str:
    """Ask for an invoice that cannot exist: moves no money, and proves address and credentials."""
    calls: CallLog = []
    found = build_gateway(settings).find(NO_SUCH_REFERENCE, calls)
    mode = "test" if settings.test_mode else "LIVE"
    return f"answers in {calls[-1].duration_ms} ms, {len(found)} match(es), {mode} mode"
