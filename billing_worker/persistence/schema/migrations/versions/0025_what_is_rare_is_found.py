"""Alerts, surplus money and taken-back answers are few: `status` finds them without reading the book."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

_RARE = (
    ("ix_events_alerts", "events", "id", "alert"),
    ("ix_attempts_surplus", "attempts", "id", "status = 'surplus'"),
    ("ix_attempts_undecided", "attempts", "undecided_since", "undecided_since IS NOT NULL"),
)


def upgrade() -> None:
    for name, table, column, rare in _RARE:
        where = sa.text(rare)
        op.create_index(name, table, [column], postgresql_where=where, sqlite_where=where)
