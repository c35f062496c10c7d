"""When each periodic sweep last finished, so that silence is noticed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from billing_worker.persistence.schema.columns import Instant

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sweep_runs",
        sa.Column("sweep", sa.String(48), nullable=False),
        sa.Column("finished_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("sweep", name="pk_sweep_runs"),
    )
