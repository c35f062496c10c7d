"""What tests of a preview ask, and what they expect of it."""

from __future__ import annotations

import json
from datetime import timedelta

from sqlalchemy import select

from billing_worker.persistence.schema import tables
from billing_worker.services.forecast.preview import preview
from billing_worker.services.forecast.variance import Comparison, compare
from billing_worker.services.subscriptions import lifecycle

DAY = timedelta(days=1)
ANN = {"by": "operator:ann", "why": "asked by phone"}


def do(world, what, reference="sub-1", **options):
    return getattr(lifecycle, what)(world.store, world.clock, reference, **(ANN | options))


def foreseen(world, until=31 * DAY):
    return list(preview(world.store, world.clock.now(), world.clock.now() + until))


def charges(lines):
    return {line.invoice: line.at for line in lines if line.reason is None}


def reasons(lines):
    return {line.invoice: line.reason for line in lines if line.reason is not None}


def debited(world):
    return {d.reference_id.rpartition("-a")[0]: d.at for d in world.sandbox.ledger}


class Kept:
    """A preview that was saved, to be compared later."""

    def __init__(self, world, until=31 * DAY):
        self._world = world
        self.made_at, self.until = world.clock.now(), world.clock.now() + until
        self.lines = [json.loads(json.dumps(line.as_dict())) for line in foreseen(world, until)]

    def compared(self):
        comparison = Comparison()
        now = self._world.clock.now()
        found = compare(
            self._world.store, now, self.made_at, self.made_at, self.until, self.lines, comparison
        )
        return {d.invoice: d for d in found}, comparison


def rows(world, table=tables.invoices):
    with world.store.reading() as connection:
        return {row.reference_id: row for row in connection.execute(select(table))}
