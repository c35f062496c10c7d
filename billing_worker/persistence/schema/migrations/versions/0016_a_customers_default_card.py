"""A customer's default card: what is charged when no card is named."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nobody has named one so far: the card that pays the customer's subscriptions is taken."""
    op.add_column("cards", sa.Column("default_since", sa.DateTime(timezone=True), nullable=True))
