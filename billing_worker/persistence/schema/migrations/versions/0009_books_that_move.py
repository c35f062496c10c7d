"""A subscription knows which book has it now, and which book it came from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The constraint comes with its column: SQLite takes none for a table that exists."""
    instant = sa.DateTime(timezone=True).compile(dialect=op.get_bind().dialect)
    op.execute(
        f"ALTER TABLE subscriptions ADD COLUMN handed_over_at {instant}"
        " CONSTRAINT ck_subscriptions_handed_over_is_not_billed"
        " CHECK (handed_over_at IS NULL OR next_billing_at IS NULL)"
    )
    op.add_column("subscriptions", sa.Column("from_book", sa.String(32), nullable=True))
    op.add_column("subscriptions", sa.Column("from_prefix", sa.String(16), nullable=True))
