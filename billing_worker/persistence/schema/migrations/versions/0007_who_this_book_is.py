"""A book has an identity, a prefix for its references, and one mode: test or live."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ALPHABET = "abcdefghjkmnpqrstvwxyz23456789"  # no letters that are mistaken for digits


def upgrade() -> None:
    table = op.create_table(
        "book",
        sa.Column("identity", sa.String(32), primary_key=True),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("test_mode", sa.Boolean(), nullable=True),
    )
    identity = "".join(secrets.choice(_ALPHABET) for _ in range(16))
    # An older book goes on under the references that it has sent before, in the mode it was in.
    charged = op.get_bind().execute(
        sa.text(
            "SELECT test_mode FROM attempts WHERE submitted_at IS NOT NULL ORDER BY id DESC LIMIT 1"
        )
    )
    last = charged.first()
    has_attempts = op.get_bind().execute(sa.text("SELECT id FROM attempts LIMIT 1")).first()
    op.bulk_insert(
        table,
        [
            {
                "identity": identity,
                "prefix": "" if has_attempts else f"{identity[:6]}-",
                "made_at": op.get_bind().execute(sa.select(sa.func.current_timestamp())).scalar(),
                "test_mode": None if last is None else bool(last.test_mode),
            }
        ],
    )
