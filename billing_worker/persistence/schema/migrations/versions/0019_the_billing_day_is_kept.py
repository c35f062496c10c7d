"""A series that begins on a month's end that was cut keeps the day of the month that is wanted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("subscriptions", sa.Column("billing_day", sa.Integer(), nullable=True))
