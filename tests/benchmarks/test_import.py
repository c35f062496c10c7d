"""Import and export of a book: seconds, and memory that does not grow with it.

pytest -m benchmark -s tests/benchmarks/test_import.py
"""

from __future__ import annotations

import json
import subprocess
import time

import psutil
import pytest
from sqlalchemy import func, select

from billing_worker.persistence.schema.tables import subscriptions
from billing_worker.persistence.store import Store
from tests.support.processes import CLI, clean_environment
from tests.support.world import KEY

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

BOOK = 100_000


def write_book(path, count):
    with path.open("w") as file:
        for number in range(count):
            record = {
                "reference_id": f"sub-{number}",
                "customer": {"reference_id": f"customer-{number}", "name": "Jo Doe",
                             "email": f"jo.{number}@example.com"},
                "card": {"token": f"4c9jHUgeL1SD7g5byDYn9Gc0RC6{number}",
                         "mask": "512381******0000", "brand": "mastercard",
                         "expiry_month": 12, "expiry_year": 2032},
                "amount": "9.99", "currency": ("USD", "EUR")[number % 2], "interval": "month",
                "interval_count": 1, "anchor_at": "2026-01-31T00:00:00Z",
                "timezone": "Europe/Berlin", "trial_end": None,
                "paid_through": "2099-01-31T00:00:00Z", "ends_after_periods": None,
                "description": "Pro plan", "metadata": {},
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")


def run(settings, folder, *arguments):
    """Seconds, CPU seconds, and resident megabytes after a quarter of the time and at their peak.

    On a busy machine the CPU seconds tell more than the others.
    """
    samples = []
    cpu = 0.0
    started = time.monotonic()
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen([*CLI, *arguments], env=clean_environment(settings), stdout=out)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            samples.append(watched.memory_info().rss / 2**20)
            cpu = sum(watched.cpu_times()[:2])
            time.sleep(0.1)
    seconds = time.monotonic() - started
    assert process.returncode == 0
    return seconds, cpu, samples[len(samples) // 4], max(samples)


def test_a_book_of_100000_is_imported_and_exported(postgres, tmp_path):
    write_book(tmp_path / "book.jsonl", BOOK)
    with postgres.temporary_database(template="template_billing") as url:
        settings = {"BILLING_DATABASE_URL": url, "BILLING_VAULT_KEYS": KEY}
        book = ("subscriptions", "import", str(tmp_path / "book.jsonl"))
        print()
        for name, arguments in {
            "dry run": (*book, "--dry-run"),
            "import": (*book, "--held"),
            "import again": book,
            "arm --all": ("subscriptions", "arm", "--all"),
            "export": ("subscriptions", "export", "--with-tokens"),
        }.items():
            seconds, cpu, quarter, peak = run(settings, tmp_path, *arguments)
            print(f"{name:13} {BOOK} in {seconds:5.1f} s ({cpu:.1f} s CPU), "
                  f"{BOOK / seconds:6.0f}/s, memory {quarter:.0f} MB after a quarter, "
                  f"at most {peak:.0f} MB")  # fmt: skip
        with Store(url) as store, store.reading() as connection:
            query = select(func.count()).where(subscriptions.c.next_billing_at.is_not(None))
            assert connection.execute(query).scalar() == BOOK
