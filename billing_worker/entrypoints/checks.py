"""The checks of `billing-worker check`: is each part that the worker needs there, and does
it work?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from redis import Redis
from redis.exceptions import RedisError, ResponseError
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.bootstrap import build_gateway, build_store
from billing_worker.clock import SystemClock
from billing_worker.config import Settings
from billing_worker.domain.errors import (
    BillingError,
    GatewayError,
    LookUpUnreliable,
    NotSent,
    OutcomeUnknown,
)
from billing_worker.domain.statement import Statement
from billing_worker.entrypoints.book_checks import check_book, check_clock, check_standby
from billing_worker.entrypoints.web.addresses import CALLBACKS
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.gateway.http import Request, RequestsTransport
from billing_worker.gateway.paycore import PaycoreGateway
from billing_worker.gateway.port import CallLog
from billing_worker.persistence import attempts, postgres, sweep_runs
from billing_worker.persistence.schema.migrate import current_revision, newest_revision
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.charging.vault_keys import try_keys
from billing_worker.services.monitoring.silence import silent_sweeps

NO_SUCH_REFERENCE = "billing-worker-check"

_SERVER_ERRORS = 500


@dataclass(frozen=True, slots=True)
class Check:
    part: str
    ok: bool
    details: str


def run_checks(settings: Settings, max_age: timedelta | None = None) -> list[Check]:
    """Return one result for each part, in this order, even if others fail. None moves money.

    `max_age`: how old the last run of a sweep may be. None: any age will do.
    """
    parts: dict[str, Callable[[Settings], str]] = {
        "database": _database,
        "schema": _if_the_database_answers(_schema),
        "book": _if_the_database_answers(_of_the_book(check_book)),
        "clock": _if_the_database_answers(_of_the_book(check_clock)),
        "standby": _if_the_database_answers(_of_the_book(check_standby)),
        "redis": _redis,
        "sweeps": _if_the_database_answers(lambda settings: check_sweeps(settings, max_age)),
        "gateway": _gateway,
        "look-up": _if_the_database_answers(_look_up),
        "cardgate": _cardgate,
        "vault keys": _if_the_database_answers(_vault_keys),
        "callbacks": _callbacks,
    }
    return [_checked(part, check, settings) for part, check in parts.items()]


def _if_the_database_answers(check: Callable[[Settings], str]) -> Callable[[Settings], str]:
    def checked(settings: Settings) -> str:
        try:
            return check(settings)
        except SQLAlchemyError:
            raise BillingError("not checked: the database does not answer") from None

    return checked


def _of_the_book(check: Callable[[Settings], str]) -> Callable[[Settings], str]:
    def checked(settings: Settings) -> str:
        _schema(settings)
        return check(settings)

    return checked


def _checked(part: str, check: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(part, ok=True, details=check(settings))
    except (SQLAlchemyError, RedisError) as error:
        return Check(part, ok=False, details=f"unreachable: {_first_line(error)}")
    except BillingError as error:
        return Check(part, ok=False, details=str(error))


def _first_line(error: SQLAlchemyError | RedisError) -> str:
    cause = str(getattr(error, "orig", None) or error).strip().splitlines()
    return cause[0] if cause else type(error).__name__


def check_database(settings: Settings) -> str:
    """Raise SQLAlchemyError if the database is unreachable, BillingError if its schema is not this
    version's.
    """
    return f"{_database(settings)}, {_schema(settings)}"


def _database(settings: Settings) -> str:
    with build_store(settings) as store, store.reading() as connection:
        current_revision(connection)
        if store.is_sqlite:
            return "sqlite answers"
        lacks = postgres.not_pinned(connection)
        unsafe = postgres.loses_commits(connection)
    if lacks:
        raise BillingError(f"a transaction does not get what it relies on: {'; '.join(lacks)}")
    warning = f"; a crash of its machine loses commits: {', '.join(unsafe)}" if unsafe else ""
    return f"postgresql answers{warning}"


def _schema(settings: Settings) -> str:
    revision = _revision(settings)
    if revision != newest_revision():
        raise BillingError(
            f"is {revision or 'missing'}, this version needs {newest_revision()}: "
            "run `billing-worker migrate`"
        )
    return f"at {revision}"


def _revision(settings: Settings) -> str | None:
    with build_store(settings) as store, store.reading() as connection:
        return current_revision(connection)


class SweepsSilent(BillingError):
    """Sweeps have not finished for too long: beat or all workers are down, or cut off."""


def check_sweeps(settings: Settings, max_age: timedelta | None) -> str:
    """Raise SweepsSilent if a sweep's last run is older, naming each. None: any age will do."""
    _schema(settings)
    now = SystemClock().now()
    with build_store(settings) as store, store.reading() as connection:
        silent = silent_sweeps(connection, intervals(settings), now, max_age or timedelta.max)
        newest = sweep_runs.newest(connection)
    if silent:
        told = ", ".join(f"{one.sweep} for {_in_words(now - one.since)}" for one in silent)
        raise SweepsSilent(f"not finished: {told}. Do beat and a worker run?")
    return "none has run yet" if newest is None else f"the last one {_in_words(now - newest)} ago"


def _in_words(age: timedelta) -> str:
    return str(timedelta(seconds=max(0, int(age.total_seconds()))))


def check_redis(settings: Settings) -> str:
    """Raise RedisError if Redis is unreachable."""
    policy = _policy_when_full(settings)
    return "answers" if policy in {None, "noeviction"} else f"answers, and drops keys ({policy})"


def _redis(settings: Settings) -> str:
    policy = _policy_when_full(settings)
    if policy is None:
        return "answers; its maxmemory-policy cannot be read: it must be noeviction"
    if policy != "noeviction":
        raise BillingError(f"maxmemory-policy is {policy}: a queue needs noeviction")
    return "answers"


def _policy_when_full(settings: Settings) -> str | None:
    """Return Redis's eviction policy, or None: a hosted Redis does not tell."""
    with Redis.from_url(settings.redis_url, socket_timeout=3, socket_connect_timeout=3) as client:
        client.ping()
        try:
            policy: str | None = client.config_get("maxmemory-policy").get("maxmemory-policy")
        except ResponseError:
            return None
    return policy


def redis_trouble(url: str) -> str | None:
    """Return why Redis cannot be used, in one line, or None if it answers."""
    try:
        with Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3) as client:
            client.ping()
    except RedisError as error:
        return _first_line(error)
    return None


def _gateway(settings: Settings) -> str:
    """Ask for an invoice that cannot exist. This moves no money and tests address and
    credentials.
    """
    calls: CallLog = []
    try:
        build_gateway(settings).find(NO_SUCH_REFERENCE, calls)
    except LookUpUnreliable:
        pass  # Only the answer counts here. `_look_up` judges its content.
    except OutcomeUnknown as unknown:
        raise BillingError(_gateway_trouble(unknown)) from None
    except GatewayError as error:
        raise BillingError(f"not reached ({error.reason}): look at BILLING_GATEWAY_URL") from None
    mode = "test" if settings.test_mode else "LIVE"
    return f"answers in {calls[-1].duration_ms} ms, credentials accepted, {mode} mode"


def _look_up(settings: Settings) -> str:
    """Test the gateway's list by reference: nothing for an unknown reference, exactly one invoice
    for a known one.

    Otherwise a missing invoice in a list proves nothing.
    """
    gateway = build_gateway(settings)
    try:
        listed = _listed(gateway, NO_SUCH_REFERENCE)
    except GatewayError:
        return "not tried: the gateway gives no usable answer"
    if listed:
        raise BillingError(f"{len(listed)} invoices are listed for an unknown reference. {_DOUBT}")
    nothing = "nothing is listed for an unknown reference"
    _schema(settings)
    with build_store(settings) as store, store.reading() as connection:
        known = attempts.created_once(connection, test_mode=settings.test_mode)
    if known is None:
        return f"{nothing}; not tried with a known one, because this book has sent none yet"
    reference, gateway_id = known
    listed = _listed(gateway, reference)
    if [one.gateway_id for one in listed] != [gateway_id]:
        raise BillingError(f"{len(listed)} invoices are listed for {reference}, not one. {_DOUBT}")
    return f"{nothing}, and exactly one invoice for {reference}: it can be trusted"


_DOUBT = "A charge whose create is not answered stays unknown, see docs/gateway_account.md"


def _listed(gateway: PaycoreGateway, reference: str) -> list[Statement]:
    try:
        return gateway.find(reference, [])
    except LookUpUnreliable as error:
        raise BillingError(f"cannot be trusted: {error.reason}. {_DOUBT}") from None


def _gateway_trouble(unknown: OutcomeUnknown) -> str:
    match unknown.http_status:
        case 401 | 403 as status:
            names = "BILLING_GATEWAY_USERNAME and BILLING_GATEWAY_PASSWORD"
            return f"credentials refused ({status}): look at {names}"
        case 404 | 405 as status:
            return f"no such path ({status}): look at BILLING_GATEWAY_URL, with or without /api"
    return f"no usable answer ({unknown.reason}): look at BILLING_GATEWAY_URL"


def _cardgate(settings: Settings) -> str:
    """Send GET without a bearer to the address of sales. This is no sale and tests that a server
    answers.

    Every answer below 500 is accepted: only a real sale tests more.
    """
    url = settings.cardgate_url.rstrip("/") + "/payment/sale"
    transport = RequestsTransport(read_timeout=settings.gateway_timeout_seconds)
    poll = "look at BILLING_CARDGATE_URL"
    try:
        answer = transport.send(Request("GET", url, {"Accept": "application/json"}),
                                moves_money=False)  # fmt: skip
    except NotSent as error:
        raise BillingError(f"not reached ({error.reason}): {poll}") from None
    except GatewayError as error:
        raise BillingError(f"no usable answer ({error.reason}): {poll}") from None
    finally:
        transport.close()
    if answer.status >= _SERVER_ERRORS:
        raise BillingError(f"answers {answer.status} to a GET: {poll}")
    return f"answers {answer.status} to a GET of {urlsplit(url).path}; no sale was sent"


def _vault_keys(settings: Settings) -> str:
    """Decrypt a sample of the stored card tokens."""
    vault = FernetVault(settings.vault_keys)
    _schema(settings)
    with build_store(settings) as store, store.reading() as connection:
        found = try_keys(connection, vault)
    if not found.open_everything:
        raise BillingError(str(found))
    number = len(settings.vault_keys.reveal().split(","))
    return f"{number} key(s); {found}"


def _callbacks(settings: Settings) -> str:
    url, secret = settings.callback_url, settings.callback_secret.reveal()
    if not url and not secret:
        return "off: the gateway is asked instead"
    if not secret:
        raise BillingError(
            "BILLING_CALLBACK_URL is set and BILLING_CALLBACK_SECRET is not: all are refused"
        )
    if not url:
        return "on; BILLING_CALLBACK_URL is not set, so the gateway must know where to call"
    if urlsplit(url).path != CALLBACKS:
        return (
            f"on; `billing-worker web` takes them at {CALLBACKS}, so a proxy must map {url} to it"
        )
    return "on"
