"""A book remembers which database server it was charged from, to notice a lost past or a copy."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("book", sa.Column("server", sa.Text(), nullable=True))
    op.add_column("book", sa.Column("timeline", sa.Integer(), nullable=True))
    op.add_column("book", sa.Column("server_since", sa.DateTime(timezone=True), nullable=True))
