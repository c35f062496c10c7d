"""An amount may be agreed for periods from a date on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Constraints come with a column: SQLite takes none for a table that exists."""
    instant = sa.DateTime(timezone=True).compile(dialect=op.get_bind().dialect)
    op.execute(
        "ALTER TABLE subscriptions ADD COLUMN new_amount_minor BIGINT"
        " CONSTRAINT ck_subscriptions_new_amount_positive CHECK (new_amount_minor > 0)"
    )
    op.execute(
        f"ALTER TABLE subscriptions ADD COLUMN new_amount_from {instant}"
        " CONSTRAINT ck_subscriptions_new_amount_has_a_date"
        " CHECK ((new_amount_minor IS NULL) = (new_amount_from IS NULL))"
    )
