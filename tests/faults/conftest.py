from __future__ import annotations

import pytest

from billing_worker.persistence.store import Store
from tests.faults.bench import Bench, sqlite_bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A SQLite file that is reset before every run."""
    with sqlite_bench(tmp_path_factory.mktemp("faults") / "billing.db") as bench:
        yield bench


@pytest.fixture(scope="session")
def postgres_bench(postgres):
    with postgres.temporary_database(template="template_billing") as url, Store(url) as store:
        yield Bench(store)
