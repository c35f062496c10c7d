"""All metrics, declared in one table, and the figures of those that the database knows.

Figures of the book are queries at scrape time, so that any number of workers and restarts gives the
same. What a worker does is counted in its process (see `metering`). Labels have few values: never a
customer or a reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from billing_worker.persistence import counters, figures, sweep_runs, switches
from billing_worker.persistence.book import identity
from billing_worker.persistence.invariants import breaches
from billing_worker.persistence.outbox import cursors
from billing_worker.services.charging.callbacks import COUNTER as CALLBACKS
from billing_worker.services.monitoring.invariants import INVARIANTS

FORECAST = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as Prometheus knows it. Times in seconds, money in minor units."""

    name: str
    kind: str
    """"gauge", "counter" or "histogram"."""
    help: str
    labels: tuple[str, ...] = ()
    by_worker: bool = False
    """Counted by each worker and shown on its own port; otherwise shown by `web`."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "billing_sweep_last_success_timestamp_seconds",
            "gauge",
            "When a sweep last finished; if it never has, when the book was made.",
            ("sweep",),
        ),
        Metric(
            "billing_sweep_allowed_age_seconds",
            "gauge",
            "How old that may become before the sweep counts as silent.",
            ("sweep",),
        ),
        Metric("billing_due_count", "gauge", "Periods and invoices that are due and not begun."),
        Metric(
            "billing_due_oldest_age_seconds",
            "gauge",
            "For how long the oldest of them has been due.",
        ),
        Metric("billing_unknown_count", "gauge", "Charges whose outcome is unknown."),
        Metric(
            "billing_unknown_amount_minor",
            "gauge",
            "Money at risk: the amount of charges whose outcome is unknown.",
            ("currency",),
        ),
        Metric(
            "billing_unknown_oldest_age_seconds",
            "gauge",
            "For how long the oldest unknown outcome has been unknown.",
        ),
        Metric(
            "billing_forecast_minor",
            "gauge",
            "Amount of the periods that begin within the next 24 hours.",
            ("currency",),
        ),
        Metric("billing_queue_depth", "gauge", "Messages that wait in a queue.", ("queue",)),
        Metric("billing_outbox_lag_seconds", "gauge", "Age of the oldest event without a number."),
        Metric(
            "billing_webhooks_waiting",
            "gauge",
            "Subscriptions whose next event has still to reach an endpoint.",
            ("endpoint",),
        ),
        Metric(
            "billing_webhooks_parked",
            "gauge",
            "Those of them for which every try of the schedule has failed.",
            ("endpoint",),
        ),
        Metric(
            "billing_invariant_breaches",
            "gauge",
            "Rows that break an invariant of the books.",
            ("invariant",),
        ),
        Metric("billing_services_paused", "gauge", "Services of the gateway that are paused."),
        Metric("billing_sales_enabled", "gauge", "1 if sales are on, 0 if the kill switch is off."),
        Metric(
            "billing_callbacks_total", "counter", "Callbacks by what became of them.", ("result",)
        ),
        Metric(
            "billing_attempts_total",
            "counter",
            "Attempts that have ended: succeeded, declined, not charged or surplus.",
            ("outcome", "origin"),
            by_worker=True,
        ),
        Metric(
            "billing_declines_total",
            "counter",
            "Declines by what they mean for the next attempt.",
            ("class",),
            by_worker=True,
        ),
        Metric(
            "billing_charged_minor_total",
            "counter",
            "Amount that was charged, also what is not owed.",
            ("currency",),
            by_worker=True,
        ),
        Metric(
            "billing_refusals_total",
            "counter",
            "Attempts that a rule has forbidden.",
            ("rule",),
            by_worker=True,
        ),
        Metric(
            "billing_breaker_open",
            "gauge",
            "1 while the worker starts no charges because all of them fail.",
            by_worker=True,
        ),
        Metric(
            "billing_gateway_call_seconds",
            "histogram",
            "Requests to the gateway: answered, refused, unknown or not sent.",
            ("call", "result"),
            by_worker=True,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Sample:
    metric: Metric
    value: float
    label: str | None = None
    """The value of the metric's only label."""


def samples(
    connection: Connection, now: datetime, allowed_ages: Mapping[str, timedelta]
) -> Iterator[Sample]:
    """Yield the samples of what the database knows. `allowed_ages`: by sweep."""

    def one(name: str, value: float, label: str | None = None) -> Sample:
        return Sample(METRICS[name], value, label)

    finished, made_at = sweep_runs.last(connection), identity.read(connection).made_at
    for sweep, allowed in allowed_ages.items():
        last = finished.get(sweep, made_at)
        yield one("billing_sweep_last_success_timestamp_seconds", last.timestamp(), sweep)
        yield one("billing_sweep_allowed_age_seconds", allowed.total_seconds(), sweep)
    waiting = [
        figures.periods_to_open(connection, now),
        figures.invoices_to_charge(connection, now),
    ]
    oldest = min((one.since for one in waiting if one.since is not None), default=None)
    yield one("billing_due_count", sum(one.count for one in waiting))
    yield one("billing_due_oldest_age_seconds", _age(oldest, now))
    unknown = figures.unknown(connection)
    yield one("billing_unknown_count", unknown.count)
    yield one("billing_unknown_oldest_age_seconds", _age(unknown.since, now))
    yield from _by_label("billing_unknown_amount_minor", unknown.minor)
    due = figures.due_between(connection, now, now + FORECAST)
    yield from _by_label("billing_forecast_minor", due)
    yield one("billing_outbox_lag_seconds", _age(figures.oldest_untold(connection), now))
    backlog = cursors.backlog(connection)
    waiting_for = {str(endpoint): waits for endpoint, (waits, _) in backlog.items()}
    parked_for = {str(endpoint): parked for endpoint, (_, parked) in backlog.items()}
    yield from _by_label("billing_webhooks_waiting", waiting_for)
    yield from _by_label("billing_webhooks_parked", parked_for)
    broken = dict.fromkeys((one.name for one in INVARIANTS), 0) | breaches.counts(connection)
    yield from _by_label("billing_invariant_breaches", broken)
    switched = switches.read(connection)
    yield one("billing_services_paused", len(switched.paused))
    yield one("billing_sales_enabled", int(switched.sales_on))
    yield from _by_label("billing_callbacks_total", counters.counts(connection, CALLBACKS))


def _by_label(name: str, values: Mapping[str, int]) -> Iterator[Sample]:
    for label, value in sorted(values.items()):
        yield Sample(METRICS[name], value, label)


def _age(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else max(0.0, (now - since).total_seconds())
