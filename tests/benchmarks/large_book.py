"""How long questions about a large book take: invariants, metrics, status, explain.

    python -m tests.benchmarks.large_book [--subscriptions 100000]

Makes a book on an embedded PostgreSQL with a real disk, five invoices and attempts to a subscription
and five events to an attempt, and prints the slowest answer to each question in milliseconds. One in
25 attempts is declined, one in 2,000 unknown. The rows are written by SQL and not by the worker, so
that a million subscriptions take minutes and no day.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from billing_worker.clock import SystemClock
from billing_worker.config import load
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.persistence import invoices
from billing_worker.persistence.invariants.asking import ask, last_id
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from billing_worker.services.monitoring.inspection import SLICE
from billing_worker.services.monitoring.invariants import INVARIANTS, Invariant
from billing_worker.services.monitoring.metrics import samples
from billing_worker.services.monitoring.silence import allowed_ages
from billing_worker.services.reports.question import explain_any
from billing_worker.services.reports.status import status
from tests.entrypoints.test_config import GOOD
from tests.support.postgres import EmbeddedPostgres

PERIODS = 5

# s: number of the subscription; p: of its period. Period 4 began in the last 30 days.
_STATEMENTS = (
    """INSERT INTO customers (id, reference_id, created_at)
       SELECT s, 'customer-' || s, :start FROM generate_series(1, :many) s""",
    """INSERT INTO cards (id, customer_id, token, brand, created_at, fingerprint, declined_at)
       SELECT s, s, 'x', 'mastercard', :start, md5(s::text),
              CASE WHEN s % 25 = 0 THEN CAST(:now AS timestamptz) END
       FROM generate_series(1, :many) s""",
    """INSERT INTO subscriptions (id, reference_id, customer_id, card_id, status, amount_minor, currency,
              interval, interval_count, anchor_at, timezone, next_period, next_billing_at, metadata,
              record_digest, created_at)
       SELECT s, 'sub-' || s, s, s, CASE WHEN s % 25 = 0 THEN 'past_due' ELSE 'active' END, 999,
              CASE WHEN s % 2 = 0 THEN 'EUR' ELSE 'USD' END, 'day', 30,
              :start + (s % 40000) * interval '1 minute', 'UTC', 5,
              :start + 150 * interval '1 day' + (s % 40000) * interval '1 minute', '{}', 'x', :start
       FROM generate_series(1, :many) s""",
    """INSERT INTO invoices (id, reference_id, subscription_id, period_number, period_start, period_end,
              amount_minor, currency, status, reason, next_attempt_at, enqueue_at, not_charged_count,
              created_at, paid_at)
       SELECT (s - 1) * 5 + p + 1, 'sub-' || s || '-p' || p, s, p, began, began + interval '30 days', 999,
              CASE WHEN s % 2 = 0 THEN 'EUR' ELSE 'USD' END,
              CASE WHEN is_open THEN 'open' ELSE 'paid' END,
              CASE WHEN is_open THEN 'declined_soft: insufficient_funds' END,
              CASE WHEN declined THEN CAST(:now AS timestamptz) + interval '1 day' END,
              CASE WHEN declined THEN CAST(:now AS timestamptz) + interval '1 day' END, 0, began,
              CASE WHEN NOT is_open THEN began + interval '2 seconds' END
       FROM (SELECT s, p, :start + p * interval '30 days' + (s % 40000) * interval '1 minute' AS began,
                    p = 4 AND s % 25 = 0 AS declined,
                    p = 4 AND (s % 25 = 0 OR s % 400 = 1) AS is_open
             FROM generate_series(1, :many) s, generate_series(0, 4) p) rows""",
    """INSERT INTO attempts (id, reference_id, invoice_id, number, status, origin, card_id, amount_minor,
              currency, test_mode, fence, claims, created_at, gateway_id, submitted_at, settled_at,
              next_poll_at, rechecks, outcome)
       SELECT i.id, i.reference_id || '-a1', i.id, 1,
              CASE WHEN i.status = 'paid' THEN 'succeeded'
                   WHEN i.next_attempt_at IS NOT NULL THEN 'declined' ELSE 'submitted' END,
              'scheduled', i.subscription_id, 999, i.currency, true, 1, 1, i.created_at, 'cgi_' || i.id,
              i.created_at, i.created_at,
              CASE WHEN i.status = 'open' AND i.next_attempt_at IS NULL THEN :now END, 0,
              CASE WHEN i.status = 'paid' THEN 'processed' ELSE 'insufficient_funds' END
       FROM invoices i""",
    """INSERT INTO events (at, kind, by, alert, subscription_id, invoice_id, attempt_id, data)
       SELECT i.created_at, kind, 'charge', false, i.subscription_id, i.id,
              CASE WHEN kind LIKE 'attempt.%' THEN i.id END, '{"calls": []}'
       FROM invoices i, unnest(ARRAY['invoice.opened', 'attempt.prepared', 'attempt.submitted',
            'attempt.succeeded', 'invoice.paid']) kind
       WHERE i.status = 'paid' OR kind NOT IN ('attempt.succeeded', 'invoice.paid')""",
    "UPDATE book SET test_mode = true",
    *(
        f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), (SELECT max(id) FROM {table}))"  # noqa: S608 - our own names
        for table in ("customers", "cards", "subscriptions", "invoices", "attempts")
    ),
)


def fill(store: Store, many: int, now: datetime) -> None:
    """Write the book. The last period of each subscription began in the last 30 days."""
    given = {"many": many, "now": now, "start": now - timedelta(days=150)}
    with store.engine.connect() as connection:
        for statement in _STATEMENTS:
            _unhurried(connection, lambda one=statement: connection.execute(text(one), given))
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("VACUUM ANALYZE")


def _unhurried(connection: Any, work: Callable[[], Any]) -> None:
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    work()


@contextmanager
def measured(name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    print(f"{(time.perf_counter() - began) * 1000:8.0f} ms  {name}", flush=True)


def _slowest_slice(store: Store, invariant: Invariant, now: datetime) -> tuple[float, int]:
    """Return the slowest run in seconds, of the first, middle and last slice, and how much it found."""
    by = invariant.question.by
    with store.reading() as connection:
        last = last_id(connection, by) if by is not None else 0
        slowest, found = 0.0, 0
        for first in sorted({0, last // 2, max(0, last - SLICE)}):
            began = time.perf_counter()
            rows = ask(connection, invariant.question, now, now, range(first, first + SLICE))
            slowest, found = max(slowest, time.perf_counter() - began), found + len(rows)
    return slowest, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscriptions", type=int, default=100_000)
    many = parser.parse_args().subscriptions
    now = SystemClock().now()
    sweeps, timings = intervals(load(GOOD)), load(GOOD).timings
    with EmbeddedPostgres(durable=True) as server:
        server.create_database("large")
        with Store(server.url("large")) as store:
            migrate(store)
            with measured(f"to write {many:,} subscriptions, {many * PERIODS:,} attempts"):
                fill(store, many, now)
            print(
                f"invariants, slowest of three slices of {SLICE:,} rows; in brackets what is broken"
            )
            for invariant in INVARIANTS:
                seconds, found = _slowest_slice(store, invariant, now - timedelta(hours=1))
                print(f"{seconds * 1000:8.0f} ms  {invariant.name} ({found})", flush=True)
            with store.reading() as connection:
                ages = allowed_ages(sweeps, timings.silence)
                for turn in ("first", "second"):
                    with measured(f"all figures of /metrics, {turn} time"):
                        list(samples(connection, now, ages))
                with measured("status"):
                    status(connection, now)
                for part in (invoices.summary, invoices.oldest_unknown, invoices.surplus):
                    with measured(f"of it {part.__name__}"):
                        part(connection)
                with measured("explain sub-1"):
                    explain_any(connection, "sub-1", now)


if __name__ == "__main__":
    main()
