"""The page of a customer is found by the digest of its random name."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A page that is open already gets its name when it is asked for again: names are encrypted,
    and no migration has the keys.
    """
    named = sa.text("page_digest IS NOT NULL")
    for table in ("attempts", "hosted_payments"):
        op.add_column(table, sa.Column("page_digest", sa.String(64), nullable=True))
        op.create_index(
            f"uq_{table}_page_digest",
            table,
            ["page_digest"],
            unique=True,
            postgresql_where=named,
            sqlite_where=named,
        )
