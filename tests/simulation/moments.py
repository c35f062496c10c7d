"""Moments that chance alone comes to in one seed of hundreds: one charge is led to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from greenlet import GreenletExit
from sqlalchemy import bindparam, func, select

from billing_worker.domain.events import EventKind
from billing_worker.persistence.schema import tables
from billing_worker.services.charging.charge import charge_batch

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulation, Task

_PAST_THE_LEASE: Final = 301
"""Ten of them are within the hour after which a first charge counts as missed."""

_LONGER_THAN_THE_GATE: Final = 7
_MOST_TASKS: Final = 6

_CHARGEABLE = select(tables.invoices.c.id, tables.invoices.c.reference_id).where(
    tables.invoices.c.enqueue_at <= bindparam("now")
)
_SUBMITTED = select(func.count()).where(tables.events.c.kind == EventKind.ATTEMPT_SUBMITTED)


class Died(GreenletExit):
    """The process ends here. A BaseException: no service may catch it."""


def one_charge_keeps_crashing(simulation: Simulation) -> None:
    """Whoever takes it up dies of it, as often as it is taken up."""
    reference = f"sub-{simulation.rng.randrange(simulation.subscriptions)}-"
    simulation._say(f"whoever charges {reference} dies of it")
    for _ in range(12):
        due = _due(simulation)
        if due and not any(name.startswith(reference) for name in due.values()):
            reference = f"{next(iter(due.values())).rpartition('-')[0]}-"
        task = _begin(simulation, [id_ for id_, name in due.items() if name.startswith(reference)])
        while task is not None and not task.run.dead and not task.at.endswith("leaves"):
            simulation._switch(task)
        if task is None or task.run.dead:
            return
        simulation._say(f"{task.name} dies at {task.at}")
        simulation.tasks.remove(task)
        task.run.throw(Died)
        simulation.world.clock.advance(_PAST_THE_LEASE)


def somebody_sleeps_before_a_sale(simulation: Simulation) -> None:
    """Longer than the sale may take to follow its commit."""
    before = _submitted(simulation)
    task = _begin(simulation, list(_due(simulation))[:1])
    while task is not None and not task.run.dead and _submitted(simulation) == before:
        simulation._switch(task)
    if task is not None and not task.run.dead:
        simulation._say(f"{task.name} sleeps before its sale")
        simulation.world.clock.advance(_LONGER_THAN_THE_GATE)
        simulation._switch(task)


def _due(simulation: Simulation) -> dict[int, str]:
    with simulation.store.reading() as connection:
        rows = connection.execute(_CHARGEABLE, {"now": simulation.world.clock.now()})
        return {row.id: row.reference_id for row in rows}


def _submitted(simulation: Simulation) -> int:
    with simulation.store.reading() as connection:
        return int(connection.execute(_SUBMITTED).scalar_one())


def _begin(simulation: Simulation, invoice_ids: list[int]) -> Task | None:
    if not invoice_ids or len(simulation.tasks) >= _MOST_TASKS:
        return None
    work = f"charge {invoice_ids}"
    simulation._begin(work, lambda ports: charge_batch(ports, invoice_ids))
    task = simulation.tasks[-1] if simulation.tasks else None
    return task if task is not None and task.name == work else None
