"""`GET /metrics`: figures for Prometheus, in its text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from itertools import groupby

import structlog
from flask import Blueprint, Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.clock import Clock
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.web.bearer import only_with_token
from billing_worker.entrypoints.web.patience import Patient
from billing_worker.persistence.store import Store
from billing_worker.services.monitoring.metrics import METRICS, Sample, samples

log = structlog.get_logger()

KEPT_SECONDS = 5
"""Several scrapers, or an impatient one, cost the database one round of queries."""


def metrics_routes(
    store: Store,
    clock: Clock,
    depths: Callable[[], dict[str, int]],
    allowed_ages: Mapping[str, timedelta],
    tokens: Secret,
) -> Blueprint:
    """`depths`: messages by queue; raises RedisError if Redis is away. `allowed_ages`: of the last
    run of each sweep.
    """
    routes = only_with_token(Blueprint("metrics", __name__), tokens)
    exposed = Patient(
        lambda: _exposed(store, clock, depths, allowed_ages), kept_seconds=KEPT_SECONDS
    )

    @routes.get("/metrics")
    def metrics() -> Response | tuple[Response, int]:
        try:
            text = exposed.result()
        except (SQLAlchemyError, TimeoutError):
            return Response("the database does not answer\n", mimetype="text/plain"), 503
        return Response(text, content_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes


def _exposed(
    store: Store,
    clock: Clock,
    depths: Callable[[], dict[str, int]],
    allowed_ages: Mapping[str, timedelta],
) -> bytes:
    with store.reading() as connection:
        found = list(samples(connection, clock.now(), allowed_ages))
    try:
        depth = METRICS["billing_queue_depth"]
        found += [Sample(depth, number, queue) for queue, number in depths().items()]
    except RedisError:
        log.warning("metrics.redis_away")  # and the metric is missing: an alert rule tells of it
    registry = CollectorRegistry()
    registry.register(_Once(found))
    return generate_latest(registry)


class _Once(Collector):
    """Samples that were read, as families of Prometheus."""

    def __init__(self, found: list[Sample]) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        ordered = sorted(self._found, key=lambda sample: sample.metric.name)
        for metric, group in groupby(ordered, key=lambda sample: sample.metric):
            family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
                metric.name, metric.help, labels=metric.labels
            )
            for sample in group:
                family.add_metric([sample.label] if sample.label else [], sample.value)
            yield family
