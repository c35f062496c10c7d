"""The feed goes on after a restore, forgets what is old, and is passed on to a queue."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    for column in (
        sa.Column("floor", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("restored_at", _INSTANT),
        sa.Column("forgotten", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("queued", sa.BigInteger()),
        sa.Column("queue_claim", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("queue_lease_until", _INSTANT),
    ):
        op.add_column("feed", column)
