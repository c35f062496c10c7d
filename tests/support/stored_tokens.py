"""Other tokens for cards that are stored already, encrypted as the product does."""

from __future__ import annotations

from sqlalchemy import select, update

from billing_worker.domain.secret import Secret, card_of
from billing_worker.persistence.schema.tables import cards


def put_token(world, token, *card_ids, vault=None):
    """Store it in these cards; in all of them if none is named."""
    with world.store.transaction() as connection:
        for row in connection.execute(select(cards.c.id, cards.c.customer_id)).all():
            if row.id in card_ids or not card_ids:
                locked = (vault or world.vault).lock(Secret(token), card_of(row.customer_id))
                connection.execute(update(cards).where(cards.c.id == row.id).values(token=locked))


def token_of(world, card):
    """The token of a row of `cards`, in clear."""
    return world.vault.unlock(card.token, card_of(card.customer_id)).reveal()
