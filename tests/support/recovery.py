"""What tests of declines and cards do to a world, and look for in it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select

from billing_worker.domain.secret import Secret
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.new_card import Scope, add_backup_card, replace_card
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.import_records.subscription import CardRecord
from tests.support.stored_tokens import put_token
from tests.support.world import World


def card(token: str, **changes: Any) -> CardRecord:
    fields = {"mask": "512381******0000", "brand": "mastercard", "expiry_month": 12}
    return CardRecord(token=Secret(token), **(fields | {"expiry_year": 2032} | changes))


def replace(
    world: World,
    token: str,
    reference: str = "sub-1",
    scope: Scope = Scope.SUBSCRIPTION,
    **changes: Any,
) -> dict[str, Any]:
    return replace_card(
        world.store, world.vault, world.clock, subscription_reference=reference,
        card=card(token, **changes), scope=scope, by="test", why="lost",
    )  # fmt: skip


def add_backup(world: World, token: str, reference: str = "sub-1") -> dict[str, Any]:
    return add_backup_card(
        world.store, world.vault, world.clock, subscription_reference=reference, card=card(token),
        consent="ticked at checkout", by="test",
    )  # fmt: skip


def retry(world: World, reference: str = "sub-1-p0") -> dict[str, Any]:
    return retry_invoice(world.store, world.clock, reference=reference, by="ann", why="phone call")


def decline_stands(world: World) -> None:
    """What is asked for now is charged once the last decline has stood for its minutes."""
    world.clock.advance(world.ports.timings.decline_stands)
    world.tick()


def banks_change_their_mind(world: World, token: str) -> None:
    """From now on every card does what this token is scripted to do: a top-up, an outage …"""
    put_token(world, token)


def events(world: World, kind: str) -> list[dict[str, Any]]:
    """The data of all events of a kind, whatever they are about, oldest first."""
    with world.store.reading() as connection:
        query = select(tables.events.c.data).where(tables.events.c.kind == kind)
        return list(connection.execute(query.order_by(tables.events.c.id)).scalars())


def origins(world: World, reference: str = "sub-1-p0") -> list[str]:
    return [attempt["origin"] for attempt in world.explain(reference)["attempts"]]


def sold_at(world: World, reference: str = "sub-1-p0") -> list[datetime]:
    attempts = world.explain(reference)["attempts"]
    return [datetime.fromisoformat(a["submitted_at"]) for a in attempts if a["submitted_at"]]


def subscription(world: World, reference: str = "sub-1") -> Any:
    with world.store.reading() as connection:
        table = tables.subscriptions
        return connection.execute(select(table).where(table.c.reference_id == reference)).one()
