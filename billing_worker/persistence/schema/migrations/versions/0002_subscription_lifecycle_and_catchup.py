"""Subscription lifecycle and catch-up."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Each constraint comes with its column: SQLite takes none for a table that exists."""
    instant = sa.DateTime(timezone=True).compile(dialect=op.get_bind().dialect)
    op.execute("ALTER TABLE subscriptions ADD COLUMN series_start INTEGER DEFAULT 0 NOT NULL")
    op.execute(
        f"ALTER TABLE subscriptions ADD COLUMN paused_at {instant}"
        " CONSTRAINT ck_subscriptions_paused_at_while_paused"
        " CHECK (paused_at IS NULL OR status = 'paused')"
    )
    op.execute("ALTER TABLE subscriptions ADD COLUMN paused_from VARCHAR(16)")
    op.execute(f"ALTER TABLE subscriptions ADD COLUMN cancels_at {instant}")
    op.execute(
        "ALTER TABLE subscriptions ADD COLUMN catch_up VARCHAR(24) DEFAULT 'collect_latest'"
        " NOT NULL CONSTRAINT ck_subscriptions_catch_up_known CHECK"
        " (catch_up IN ('collect_latest', 'collect_all', 'forgive_older_than', 'hold'))"
    )
    op.execute(
        "ALTER TABLE subscriptions ADD COLUMN catch_up_days INTEGER"
        " CONSTRAINT ck_subscriptions_catch_up_days_where_needed CHECK"
        " ((catch_up IN ('collect_all', 'forgive_older_than')) = (catch_up_days IS NOT NULL))"
    )
    op.add_column("invoices", sa.Column("description", sa.Text(), nullable=True))
    op.add_column(
        "invoices", sa.Column("paused_attempt_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.execute(
        "UPDATE invoices SET description = (SELECT description FROM subscriptions"
        " WHERE subscriptions.id = invoices.subscription_id)"
    )
