"""Callbacks, tokenisation and checkout."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("cards", sa.Column("holder", sa.Text(), nullable=True))
    op.add_column("cards", sa.Column("issuer_name", sa.Text(), nullable=True))
    op.add_column("cards", sa.Column("issuer_country", sa.String(length=8), nullable=True))
    _let_links_have_no_card()
    _create_hosted_payments()
    _create_callbacks()


def _let_links_have_no_card() -> None:
    page = sa.LargeBinary().compile(dialect=op.get_bind().dialect)
    op.execute(
        f"ALTER TABLE attempts ADD COLUMN page {page} CONSTRAINT ck_attempts_card_unless_link"
        " CHECK (card_id IS NOT NULL OR origin = 'link')"
    )
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("attempts", "card_id", existing_type=KEY, nullable=True)
    else:
        _rebuild("attempts", "card_id INTEGER NOT NULL", "card_id INTEGER")


def _rebuild(table: str, before: str, after: str) -> None:
    """SQLite alters no column: copy the rows into a table that is described anew."""
    connection = op.get_bind()
    described = sa.text("SELECT sql FROM sqlite_master WHERE tbl_name = :name AND type = :type")
    indexes = connection.execute(described, {"name": table, "type": "index"}).scalars().all()
    creation = connection.execute(described, {"name": table, "type": "table"}).scalar_one()
    if creation.count(before) != 1 or f"TABLE {table} " not in creation:
        raise ValueError(f"{table} is not described as expected: {creation}")
    renamed = creation.replace(f"TABLE {table} ", f"TABLE {table}_anew ", 1)
    op.execute(renamed.replace(before, after))
    op.execute(f"INSERT INTO {table}_anew SELECT * FROM {table}")  # noqa: S608 - our own names
    op.drop_table(table)
    op.rename_table(f"{table}_anew", table)
    for index in filter(None, indexes):  # those of unique constraints have no text of their own
        op.execute(index)


def _create_hosted_payments() -> None:
    op.create_table(
        "hosted_payments",
        sa.Column("id", KEY, nullable=False),
        sa.Column("reference_id", sa.String(length=160), nullable=False),
        sa.Column("gateway_reference", sa.String(length=160), nullable=False),
        sa.Column("record_digest", sa.String(length=64), nullable=False),
        sa.Column("customer_id", KEY, nullable=False),
        sa.Column("attempt_id", KEY, nullable=True),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("test_mode", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("gateway_id", sa.String(length=128), nullable=True),
        sa.Column("page", sa.LargeBinary(), nullable=True),
        sa.Column("opened_at", INSTANT, nullable=True),
        sa.Column("settled_at", INSTANT, nullable=True),
        sa.Column("look_at", INSTANT, nullable=True),
        sa.Column("unpaid_since", INSTANT, nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("card_id", KEY, nullable=True),
        sa.CheckConstraint(
            "status IN ('prepared', 'open', 'stored', 'no_card', 'unpaid')",
            name=op.f("ck_hosted_payments_status_known"),
        ),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_hosted_payments_amount_positive")),
        sa.CheckConstraint(
            "status IN ('prepared', 'unpaid') OR gateway_id IS NOT NULL",
            name=op.f("ck_hosted_payments_opened_only_with_gateway_id"),
        ),
        sa.CheckConstraint(
            "(status = 'stored') = (card_id IS NOT NULL)",
            name=op.f("ck_hosted_payments_stored_has_a_card"),
        ),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_hosted_payments_customer_id")
        ),
        sa.ForeignKeyConstraint(
            ["attempt_id"], ["attempts.id"], name=op.f("fk_hosted_payments_attempt_id")
        ),
        sa.ForeignKeyConstraint(["card_id"], ["cards.id"], name=op.f("fk_hosted_payments_card_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hosted_payments")),
        sa.UniqueConstraint("reference_id", name=op.f("uq_hosted_payments_reference_id")),
        sa.UniqueConstraint("gateway_reference", name=op.f("uq_hosted_payments_gateway_reference")),
        sa.UniqueConstraint("gateway_id", name=op.f("uq_hosted_payments_gateway_id")),
    )
    op.create_index(
        "ix_hosted_payments_look",
        "hosted_payments",
        ["look_at"],
        postgresql_where=sa.text("look_at IS NOT NULL"),
        sqlite_where=sa.text("look_at IS NOT NULL"),
    )


def _create_callbacks() -> None:
    op.create_table(
        "callbacks",
        sa.Column("id", KEY, nullable=False),
        sa.Column("received_at", INSTANT, nullable=False),
        sa.Column("gateway_id", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_callbacks")),
        sa.UniqueConstraint("digest", name=op.f("uq_callbacks_digest")),
    )
    op.create_index(op.f("ix_callbacks_gateway_id"), "callbacks", ["gateway_id"])
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=48), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("changed_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
