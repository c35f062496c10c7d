"""A named person may say whether an attempt of unknown outcome was paid."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    instant = sa.DateTime(timezone=True)
    op.add_column("attempts", sa.Column("resolved_at", instant, nullable=True))
    op.add_column("attempts", sa.Column("resolved_over", sa.Text(), nullable=True))
