"""Cards, dunning and network rules."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    _remember_cards()
    op.add_column("subscriptions", sa.Column("dunning_policy", sa.String(32), nullable=True))
    _date_the_recovery()
    op.add_column("attempts", sa.Column("original_code", sa.Text(), nullable=True))
    counted = sa.text("status IN ('submitted', 'declined')")
    op.create_index(
        "ix_attempts_budget",
        "attempts",
        ["card_id", "submitted_at"],
        postgresql_where=counted,
        sqlite_where=counted,
    )
    with op.batch_alter_table("switches") as switches:
        switches.alter_column("name", existing_type=sa.String(32), type_=sa.String(160))


def _remember_cards() -> None:
    """Cards stored before this have no fingerprint: their tokens are encrypted, and a migration
    has no keys. Each of them has a budget of its own.
    """
    op.add_column("cards", sa.Column("fingerprint", sa.String(64), nullable=True))
    op.add_column("cards", sa.Column("declined_at", INSTANT, nullable=True))
    op.add_column("cards", sa.Column("unusable_reason", sa.Text(), nullable=True))
    op.add_column("cards", sa.Column("backup_since", INSTANT, nullable=True))
    op.add_column("cards", sa.Column("backup_consent", sa.Text(), nullable=True))
    op.add_column("cards", sa.Column("warned_days", sa.Integer(), nullable=True))
    op.create_index(op.f("ix_cards_fingerprint"), "cards", ["fingerprint"])
    op.create_index("ix_cards_expiry", "cards", ["expiry_year", "expiry_month"])


def _date_the_recovery() -> None:
    origin = sa.Column("next_origin", sa.String(16), server_default="scheduled", nullable=False)
    op.add_column("invoices", origin)
    op.add_column("invoices", sa.Column("first_declined_at", INSTANT, nullable=True))
    instant = INSTANT.compile(dialect=op.get_bind().dialect)
    # The constraint comes with its column: SQLite takes none for a table that exists.
    op.execute(
        f"ALTER TABLE invoices ADD COLUMN give_up_at {instant} CONSTRAINT"
        " ck_invoices_patience_only_while_open CHECK (give_up_at IS NULL OR status = 'open')"
    )
    waited_for = sa.text("give_up_at IS NOT NULL")
    op.create_index(
        "ix_invoices_give_up",
        "invoices",
        ["give_up_at"],
        postgresql_where=waited_for,
        sqlite_where=waited_for,
    )
