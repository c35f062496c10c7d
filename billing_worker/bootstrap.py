"""The composition root: builds every collaborator from the settings, once per process."""

from __future__ import annotations

from billing_worker.clock import SystemClock
from billing_worker.config import Settings
from billing_worker.gateway.http import RequestsTransport
from billing_worker.gateway.pace import Pace, RedisPace, Unlimited
from billing_worker.gateway.paycore import GatewaySettings, PaycoreGateway
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.callbacks import Inbox
from billing_worker.services.crew import Threads
from billing_worker.services.ports import Bell, Ports
from billing_worker.services.together import GroupCommit


def build_store(settings: Settings) -> Store:
    return Store(settings.database_url)


def build_gateway(settings: Settings) -> PaycoreGateway:
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
    )


def build_pace(settings: Settings) -> Pace:
    if settings.gateway_max_requests_per_second is None:
        return Unlimited()
    # Imported here because only a capped process needs it.
    from redis import Redis  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415
    from redis.retry import Retry  # noqa: PLC0415

    client = Redis.from_url(
        settings.redis_url,
        socket_timeout=1,
        socket_connect_timeout=1,
        retry=Retry(NoBackoff(), 0),  # A waiting charge keeps its own pace instead.
    )
    return RedisPace(client, settings.gateway_max_requests_per_second)


def build_inbox(settings: Settings, bell: Bell) -> Inbox:
    """What taking callbacks needs: no gateway, whom only workers call."""
    return Inbox(
        store=build_store(settings),
        clock=SystemClock(),
        vault=FernetVault(settings.vault_keys),
        bell=bell,
        key=settings.callback_secret,
        test_mode=settings.test_mode,
    )


def build_ports(settings: Settings, bell: Bell) -> tuple[Ports, Threads]:
    """Everything the worker's use cases need, and the crew so that it can be told to leave."""
    crew = Threads(settings.charge_concurrency)
    ports = Ports(
        store=build_store(settings),
        gateway=build_gateway(settings),
        clock=SystemClock(),
        bell=bell,
        crew=crew,
        vault=FernetVault(settings.vault_keys),
        pace=build_pace(settings),
        terms=settings.terms,
        test_mode=settings.test_mode,
        together=GroupCommit(),
    )
    return ports, crew
