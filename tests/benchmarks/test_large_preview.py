"""Preview of a large book: seconds, and memory that does not grow with it.

pytest -m benchmark -s tests/benchmarks/test_large_preview.py
"""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import insert, literal, select, update

from billing_worker.clock import SystemClock
from billing_worker.domain.secret import Secret
from billing_worker.persistence.schema.tables import invoices, subscriptions
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.benchmarks.test_import import run
from tests.support.world import KEY

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

BOOK = 100_000
DAY = timedelta(days=1)


@pytest.fixture
def book(database_url):
    """Every tenth is weekly, the others monthly; every customer has two."""
    start = SystemClock().now() + DAY
    with Store(database_url) as store:
        for first in range(0, BOOK, 5_000):
            records = [
                parse_record(
                    {
                        "reference_id": f"sub-{n}",
                        "customer": {"reference_id": f"customer-{n - n % 2}"},
                        "card": {"token": f"4c9jHUgeL1SD7g5byDYn9Gc0RC6{n - n % 2}",
                                 "expiry_month": 12, "expiry_year": start.year + 3},
                        "amount": "9.99",
                        "currency": ("USD", "EUR")[n % 2],
                        "interval": ("month", "week")[n % 10 == 0],
                        "anchor_at": (start + timedelta(minutes=n % 40_000)).isoformat(),
                        "timezone": ("UTC", "Europe/Berlin", "America/New_York")[n % 3],
                    }
                )
                for n in range(first, first + 5_000)
            ]  # fmt: skip
            taken = subscribe(store, FernetVault(Secret(KEY)), SystemClock(), records, by="test")
            assert set(taken.outcomes) == {"added"}
        yield store


def previewed(name, database_url, folder, *, most_seconds):
    settings = {"BILLING_DATABASE_URL": database_url}
    until = (SystemClock().now() + 31 * DAY).isoformat()
    file = folder / "preview.jsonl"
    seconds, cpu, quarter, peak = run(
        settings, folder, "preview", "--until", until, "--json", "--save", str(file)
    )
    totals = json.loads((folder / "out").read_text())["totals"]
    kind = database_url.partition(":")[0]
    print(f"\n{name} on {kind}: {seconds:.1f} s, {cpu:.1f} s CPU, "
          f"memory {quarter:.0f} MB after a quarter, at most {peak:.0f} MB")  # fmt: skip
    print(f"  {totals}")
    assert cpu < most_seconds  # not the wall clock's: the machine may be shared
    assert peak < 300
    return totals, file


@pytest.mark.usefixtures("book")
def test_100000_subscriptions_for_31_days_in_under_20_seconds(database_url, tmp_path):
    totals, file = previewed(
        "preview of 100,000 subscriptions", database_url, tmp_path, most_seconds=20
    )
    assert sum(total["count"] for total in totals["charged"]) > BOOK
    assert totals["not_charged"] == {}
    settings = {"BILLING_DATABASE_URL": database_url}
    seconds, cpu, _, peak = run(settings, tmp_path, "preview", "--diff", str(file), "--json")
    print(f"  compared in {seconds:.1f} s, {cpu:.1f} s CPU, at most {peak:.0f} MB")


def test_100000_first_charges_missed_for_three_days_are_planned_anew_in_a_minute(
    book, database_url, tmp_path
):
    """As if every worker had been dead since the beat opened them."""
    since = SystemClock().now() - 3 * DAY
    with book.transaction() as connection:
        connection.execute(
            insert(invoices).from_select(
                ["reference_id", "subscription_id", "period_number", "period_start", "period_end",
                 "amount_minor", "currency", "status", "next_attempt_at", "enqueue_at",
                 "not_charged_count", "created_at"],
                select(
                    subscriptions.c.reference_id + "-p0", subscriptions.c.id, literal(0),
                    literal(since, invoices.c.period_start.type), subscriptions.c.anchor_at,
                    subscriptions.c.amount_minor, subscriptions.c.currency, literal("open"),
                    literal(since, invoices.c.period_start.type),
                    literal(since, invoices.c.period_start.type),
                    literal(0), literal(since, invoices.c.period_start.type),
                ),
            )
        )  # fmt: skip
        connection.execute(
            update(subscriptions).values(series_start=1, next_period=1, status="active")
        )
    totals, _ = previewed("the same, with 100,000 missed", database_url, tmp_path, most_seconds=60)
    assert sum(total["count"] for total in totals["charged"]) > 2 * BOOK
