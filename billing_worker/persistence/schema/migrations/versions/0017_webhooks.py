"""Receivers of events, where each is in each stream, and what became of each try."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", _KEY, primary_key=True),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("types", sa.Text()),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("old_secret", sa.LargeBinary()),
        sa.Column("old_until", _INSTANT),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.CheckConstraint(
            "status IN ('active', 'paused')", name=op.f("ck_webhook_endpoints_status_known")
        ),
        sa.UniqueConstraint("url", name=op.f("uq_webhook_endpoints_url")),
    )
    op.create_table(
        "webhook_cursors",
        _endpoint("webhook_cursors"),
        sa.Column("stream", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("head", sa.BigInteger()),
        sa.Column("next_at", _INSTANT),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("claim", sa.Integer(), nullable=False),
        sa.Column("parked_at", _INSTANT),
        sa.Column("replay_until", sa.BigInteger()),
        sa.Column("resume_at", sa.BigInteger()),
        sa.CheckConstraint(
            "(head IS NULL) = (next_at IS NULL)",
            name=op.f("ck_webhook_cursors_waits_with_a_date"),
        ),
        sa.CheckConstraint(
            "(replay_until IS NULL) = (resume_at IS NULL)",
            name=op.f("ck_webhook_cursors_replay_knows_its_way_back"),
        ),
    )
    waits = sa.text("next_at IS NOT NULL")
    op.create_index(
        "ix_webhook_cursors_due",
        "webhook_cursors",
        ["endpoint_id", "next_at"],
        postgresql_where=waits,
        sqlite_where=waits,
    )
    op.create_table(
        "deliveries",
        _endpoint("deliveries"),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("first_at", _INSTANT, nullable=False),
        sa.Column("last_at", _INSTANT, nullable=False),
        sa.Column("status", sa.Integer()),
        sa.Column("reason", sa.Text()),
        sa.Column("delivered_at", _INSTANT),
    )


def _endpoint(table: str) -> sa.Column[int]:
    key = sa.ForeignKey("webhook_endpoints.id", name=op.f(f"fk_{table}_endpoint_id"))
    return sa.Column("endpoint_id", _KEY, key, primary_key=True, autoincrement=False)
