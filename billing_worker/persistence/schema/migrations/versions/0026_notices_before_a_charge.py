"""Customers are told of a charge before it, and a charge may wait for that."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("subscriptions", sa.Column("notices", sa.String(16), nullable=True))
    op.create_table(
        "notices",
        sa.Column(
            "subscription_id",
            _KEY,
            sa.ForeignKey(
                "subscriptions.id", name=op.f("fk_notices_subscription_id_subscriptions")
            ),
            primary_key=True,
        ),
        sa.Column("period_number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("period_start", _INSTANT, nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("edition", sa.Integer(), nullable=False),
        sa.Column("told_at", _INSTANT),
        sa.Column("accepted_at", _INSTANT),
        sa.Column("accepted_by", sa.Text()),
        sa.CheckConstraint(
            "(accepted_at IS NULL) = (accepted_by IS NULL)",
            name=op.f("ck_notices_accepted_by_somebody"),
        ),
    )
