"""Commands from other services; imports that are held; one-off charges."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    _widen_subscriptions()
    op.create_table(
        "commands",
        sa.Column("id", KEY, nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("reference_id", sa.Text(), nullable=True),
        sa.Column("message_id", sa.Text(), nullable=True),
        sa.Column("arguments", JSON, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("errors", JSON, nullable=False),
        sa.Column("answer", JSON, nullable=False),
        sa.CheckConstraint(
            "outcome IN ('done', 'unchanged', 'refused', 'failed')",
            name=op.f("ck_commands_outcome_known"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commands")),
    )
    op.create_index(
        "uq_commands_one_done",
        "commands",
        ["task", "reference_id"],
        unique=True,
        postgresql_where=sa.text("outcome = 'done'"),
        sqlite_where=sa.text("outcome = 'done'"),
    )
    op.create_index("ix_commands_message_id", "commands", ["message_id"])
    op.create_index("ix_commands_reference_id", "commands", ["reference_id"])


def _widen_subscriptions() -> None:
    """Each constraint comes with its column: SQLite takes none for a table that exists."""
    instant = sa.DateTime(timezone=True).compile(dialect=op.get_bind().dialect)
    kind = (
        "kind VARCHAR(16) DEFAULT 'recurring' NOT NULL"
        " CONSTRAINT ck_subscriptions_kind_known CHECK (kind IN ('recurring', 'one_off'))"
        " CONSTRAINT ck_subscriptions_one_off_is_one_period"
        " CHECK (kind = 'recurring' OR ends_after_periods = 1)"
    )
    held = (
        "held BOOLEAN DEFAULT false NOT NULL"
        " CONSTRAINT ck_subscriptions_held_is_not_billed"
        " CHECK (NOT held OR next_billing_at IS NULL)"
    )
    paid_through = (
        f"paid_through {instant}"
        " CONSTRAINT ck_subscriptions_nothing_due_before_paid_through CHECK ("
        "next_billing_at IS NULL OR paid_through IS NULL OR next_billing_at >= paid_through)"
    )
    for column in (kind, held, f"trial_end {instant}", paid_through):
        op.execute(f"ALTER TABLE subscriptions ADD COLUMN {column}")
