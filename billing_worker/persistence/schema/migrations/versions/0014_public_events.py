"""What other systems are told: the outbox of the facts, and the feed of numbered events.

Nothing is told of what happened before: the feed begins with this migration.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", _KEY, primary_key=True),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("type", sa.String(48), nullable=False),
        sa.Column("stream", _KEY, nullable=False),
        sa.Column("invoice_id", _KEY),
        sa.Column("details", _JSON, nullable=False),
        sa.Column("trouble", sa.Text()),
        sa.Column("again_at", _INSTANT),
    )
    in_trouble = sa.text("again_at IS NOT NULL")
    op.create_index(
        "ix_outbox_trouble",
        "outbox",
        ["stream"],
        postgresql_where=in_trouble,
        sqlite_where=in_trouble,
    )
    op.create_table(
        "public_events",
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.String(64), nullable=False),
        sa.Column("type", sa.String(48), nullable=False),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("stream", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("published_at", _INSTANT, nullable=False),
        sa.UniqueConstraint("event_id", name=op.f("uq_public_events_event_id")),
        sa.UniqueConstraint("stream", "sequence", name=op.f("uq_public_events_stream_sequence")),
    )
    op.create_index(op.f("ix_public_events_published_at"), "public_events", ["published_at"])
    op.create_table(
        "streams",
        sa.Column("stream", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
    )
    feed = op.create_table(
        "feed",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
    )
    op.bulk_insert(feed, [{"id": 1, "number": 0}])
