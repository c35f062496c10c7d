"""The composition root: builds all services and adapters from the settings, once per process."""

from __future__ import annotations

from collections.abc import Callable

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from billing_worker.clock import ClockWatch, SystemClock
from billing_worker.config import Settings
from billing_worker.gateway.http import RequestsTransport
from billing_worker.gateway.paycore import GatewaySettings, PaycoreGateway
from billing_worker.gateway.port import WireCall
from billing_worker.gateway.rate_limit import Pace, RedisPace, Unlimited
from billing_worker.metering import PrometheusMeter
from billing_worker.persistence.book.machine import this_machine
from billing_worker.persistence.book.outside import FileRecord, database_file
from billing_worker.persistence.book.outside_redis import RedisRecord
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.receivers.post import Poster
from billing_worker.services.attempts.group_commit import GroupCommit
from billing_worker.services.charging.callbacks import Inbox
from billing_worker.services.charging.thread_pool import ThreadPool
from billing_worker.services.circuit_breaker import CircuitBreaker
from billing_worker.services.outbox.deliver import Outbound
from billing_worker.services.ports import Bell, Outside, Ports, Unmetered


def build_store(settings: Settings) -> Store:
    return Store(settings.database_url)


def build_gateway(
    settings: Settings, called: Callable[[WireCall], None] = lambda _: None
) -> PaycoreGateway:
    return PaycoreGateway(
        RequestsTransport(read_timeout=settings.gateway_timeout_seconds),
        SystemClock(),
        GatewaySettings(
            api_url=settings.gateway_url,
            username=settings.gateway_username,
            password=settings.gateway_password,
            cardgate_url=settings.cardgate_url,
            service_template=settings.gateway_service,
            test_mode=settings.test_mode,
            callback_url=settings.callback_url or None,
        ),
        called,
    )


def build_pace(settings: Settings) -> Pace:
    if settings.gateway_max_requests_per_second is None:
        return Unlimited()
    return RedisPace(_impatient_redis(settings), settings.gateway_max_requests_per_second)


def build_outside(settings: Settings) -> list[Outside]:
    """Return the stores that keep a record of the book outside of its database."""
    keepers: list[Outside] = []
    if settings.redis_url:
        keepers.append(RedisRecord(_impatient_redis(settings)))
    if (file := database_file(settings.database_url)) is not None:
        keepers.append(FileRecord(file, this_machine()))
    return keepers


def _impatient_redis(settings: Settings) -> Redis:
    return Redis.from_url(
        settings.redis_url,
        socket_timeout=1,
        socket_connect_timeout=1,
        retry=Retry(NoBackoff(), 0),  # A charge does not wait for Redis.
    )


def build_inbox(settings: Settings, bell: Bell) -> Inbox:
    """Return what the callback endpoint needs. It has no gateway: only workers call the gateway."""
    return Inbox(
        store=build_store(settings),
        clock=SystemClock(),
        vault=FernetVault(settings.vault_keys),
        bell=bell,
        key=settings.callback_secret,
        test_mode=settings.test_mode,
    )


def build_outbound(settings: Settings, store: Store) -> Outbound:
    """Return what sending webhooks needs."""
    return Outbound(
        store=store,
        clock=SystemClock(),
        vault=FernetVault(settings.vault_keys),
        post=Poster(allow_private=settings.webhooks_allow_private),
        waits=settings.webhooks_schedule_seconds,
    )


def build_ports(settings: Settings, bell: Bell) -> tuple[Ports, ThreadPool]:
    """Return everything that the worker's use cases need, and the thread pool, to stop it."""
    pool = ThreadPool(settings.charge_concurrency)
    breaker = CircuitBreaker()
    meter = PrometheusMeter(breaker) if settings.metrics_port else Unmetered()
    ports = Ports(
        store=build_store(settings),
        gateway=build_gateway(settings, meter.called),
        clock=SystemClock(),
        bell=bell,
        pool=pool,
        vault=FernetVault(settings.vault_keys),
        pace=build_pace(settings),
        timings=settings.timings,
        test_mode=settings.test_mode,
        commit_group=GroupCommit(),
        outside=build_outside(settings),
        breaker=breaker,
        meter=meter,
        timekeeper=ClockWatch(SystemClock()),
        how_to_cancel=settings.how_to_cancel or None,
        needs_synchronous_standby=settings.require_synchronous_standby,
    )
    return ports, pool
