"""A subscription knows when it was taken back, and a book which one it was taken back from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    instant = sa.DateTime(timezone=True)
    op.add_column("subscriptions", sa.Column("taken_back_at", instant, nullable=True))
    op.add_column("book", sa.Column("taken_back_at", instant, nullable=True))
    op.add_column("book", sa.Column("other_book", sa.String(32), nullable=True))
    op.add_column("book", sa.Column("other_prefix", sa.String(16), nullable=True))
    op.execute(
        "UPDATE subscriptions SET taken_back_at = (SELECT max(at) FROM events"
        " WHERE subscription_id = subscriptions.id AND kind = 'subscription.taken_back')"
        " WHERE id IN (SELECT subscription_id FROM events WHERE kind = 'subscription.taken_back')"
    )
