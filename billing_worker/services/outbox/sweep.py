"""The sweep of each second: number new events, pass them on, wake the senders."""

from __future__ import annotations

from collections.abc import Callable

from billing_worker.persistence import switches
from billing_worker.services.guards import lost_memory
from billing_worker.services.outbox.publish import publish
from billing_worker.services.outbox.relay import Send, relay
from billing_worker.services.ports import Ports

STANDBY = "standby"
"""A refusal to charge that does not forbid sending events."""


def tell(ports: Ports, wake: Callable[[], object], send: Send | None) -> int:
    """Return how many events were published. `send`: to the queue of other systems, if there is
    one.

    A copy of the database sends nothing, because the original does. After a restore the loss is
    noticed before a number is used again.
    """
    if not _may_tell(ports):
        return 0
    published = publish(ports.store, ports.clock, ports.how_to_cancel)
    if send is not None:
        relay(ports.store, ports.clock, send)
    wake()
    return published


def _may_tell(ports: Ports) -> bool:
    records = lost_memory.read_outside(ports)
    with ports.store.reading() as connection:
        found = lost_memory.doubt(ports, connection, switches.read(connection), records)
    if found is None or found.name == STANDBY:
        return True
    lost_memory.resolve(ports, found)
    return False
