"""What the books are asked about while they work, and what was found to be broken."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from billing_worker.persistence.schema.columns import Instant

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "invariant_runs",
        sa.Column("invariant", sa.String(48), nullable=False),
        sa.Column("ran_at", Instant, nullable=False),
        sa.Column("next_id", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("invariant", name="pk_invariant_runs"),
    )
    op.create_table(
        "breaches",
        sa.Column("invariant", sa.String(48), nullable=False),
        sa.Column("row_id", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("reference", sa.Text, nullable=False),
        sa.Column("found_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("invariant", "row_id", name="pk_breaches"),
    )
