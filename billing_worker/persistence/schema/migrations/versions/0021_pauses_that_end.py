"""A pause may end at a date."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "subscriptions", sa.Column("resumes_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.add_column(
        "subscriptions",
        sa.Column("resumes_shifted", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.create_index(
        "ix_subscriptions_resuming",
        "subscriptions",
        ["resumes_at"],
        postgresql_where=sa.text("resumes_at IS NOT NULL"),
        sqlite_where=sa.text("resumes_at IS NOT NULL"),
    )
