"""The counters of one worker process, in Prometheus's terms.

Celery's threads share one process, so its counters need no directory of files between processes.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)

from billing_worker.domain.attempt import PAID, Attempt, AttemptStatus
from billing_worker.domain.declines import classify
from billing_worker.gateway.port import WireCall
from billing_worker.services.circuit_breaker import CircuitBreaker
from billing_worker.services.monitoring.metrics import METRICS

# They would be a gauge beside each counter, which nobody has declared.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library's function has no types

_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_CALLS: Final = {"look": "poll"}
"""The history calls a poll so."""


class PrometheusMeter:
    """The port `Meter`. Metrics that are not declared cannot be made."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.registry = CollectorRegistry()
        self._attempts = self._counter("billing_attempts_total")
        self._declines = self._counter("billing_declines_total")
        self._charged = self._counter("billing_charged_minor_total")
        self._refusals = self._counter("billing_refusals_total")
        declared = METRICS["billing_breaker_open"]
        is_open = Gauge(declared.name, declared.help, registry=self.registry)
        is_open.set_function(lambda: float(breaker.is_open))
        declared = METRICS["billing_gateway_call_seconds"]
        self._calls = Histogram(
            declared.name, declared.help, declared.labels, registry=self.registry, buckets=_SECONDS
        )

    def _counter(self, name: str) -> Counter:
        declared = METRICS[name]
        return Counter(declared.name, declared.help, declared.labels, registry=self.registry)

    def ended(self, attempt: Attempt) -> None:
        self._attempts.labels(attempt.status, attempt.origin).inc()
        if attempt.status is AttemptStatus.DECLINED:
            self._declines.labels(classify(attempt.outcome)).inc()
        if attempt.status in PAID:
            self._charged.labels(attempt.money.currency).inc(attempt.money.minor)

    def refused(self, rule: str) -> None:
        self._refusals.labels(rule).inc()

    def called(self, call: WireCall) -> None:
        operation = _CALLS.get(call.operation, call.operation)
        self._calls.labels(operation, _result(call.outcome)).observe(call.duration_ms / 1000)

    def serve(self, host: str, port: int) -> None:
        """Serve them in a thread of their own. Raises OSError if the port is taken."""
        start_http_server(port, host, self.registry)


def _result(outcome: str) -> str:
    """Return one of a few words: "201" and "unknown: read timeout" have many."""
    kind = outcome.partition(":")[0]
    return "answered" if kind.isdigit() else kind.replace(" ", "_")
