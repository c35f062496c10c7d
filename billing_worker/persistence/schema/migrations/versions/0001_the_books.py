"""The books: customers, cards, subscriptions, invoices, attempts, history, switches."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "customers",
        sa.Column("id", KEY, nullable=False),
        sa.Column("reference_id", sa.String(length=160), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_customers")),
        sa.UniqueConstraint("reference_id", name=op.f("uq_customers_reference_id")),
    )
    op.create_table(
        "events",
        sa.Column("id", KEY, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=48), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("alert", sa.Boolean(), nullable=False),
        sa.Column("subscription_id", KEY, nullable=True),
        sa.Column("invoice_id", KEY, nullable=True),
        sa.Column("attempt_id", KEY, nullable=True),
        sa.Column("data", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index("ix_events_invoice_id", "events", ["invoice_id"], unique=False)
    op.create_index("ix_events_subscription_id", "events", ["subscription_id"], unique=False)
    op.create_table(
        "switches",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("is_on", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("by", sa.Text(), nullable=True),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_switches")),
    )
    op.create_table(
        "cards",
        sa.Column("id", KEY, nullable=False),
        sa.Column("customer_id", KEY, nullable=False),
        sa.Column("token", sa.LargeBinary(), nullable=False),
        sa.Column("mask", sa.String(length=32), nullable=True),
        sa.Column("brand", sa.String(length=32), nullable=True),
        sa.Column("expiry_month", sa.Integer(), nullable=True),
        sa.Column("expiry_year", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_cards_customer_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cards")),
    )
    op.create_index(op.f("ix_cards_customer_id"), "cards", ["customer_id"], unique=False)
    op.create_table(
        "subscriptions",
        sa.Column("id", KEY, nullable=False),
        sa.Column("reference_id", sa.String(length=160), nullable=False),
        sa.Column("customer_id", KEY, nullable=False),
        sa.Column("card_id", KEY, nullable=True),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("interval", sa.String(length=8), nullable=False),
        sa.Column("interval_count", sa.Integer(), nullable=False),
        sa.Column("anchor_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("timezone", sa.String(length=64), nullable=False),
        sa.Column("ends_after_periods", sa.Integer(), nullable=True),
        sa.Column("next_period", sa.Integer(), nullable=False),
        sa.Column("next_billing_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("record_digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "next_billing_at IS NULL OR status IN ('trialing', 'active', 'past_due')",
            name=op.f("ck_subscriptions_billed_only_while_billable"),
        ),
        sa.CheckConstraint(
            "status IN ('trialing', 'active', 'past_due', 'suspended', 'paused', 'cancelled', 'ended')",
            name=op.f("ck_subscriptions_status_known"),
        ),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_subscriptions_amount_positive")),
        sa.CheckConstraint("interval_count > 0", name=op.f("ck_subscriptions_interval_positive")),
        sa.ForeignKeyConstraint(["card_id"], ["cards.id"], name=op.f("fk_subscriptions_card_id")),
        sa.ForeignKeyConstraint(
            ["customer_id"], ["customers.id"], name=op.f("fk_subscriptions_customer_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscriptions")),
        sa.UniqueConstraint("reference_id", name=op.f("uq_subscriptions_reference_id")),
    )
    op.create_index(
        op.f("ix_subscriptions_customer_id"), "subscriptions", ["customer_id"], unique=False
    )
    op.create_index(
        "ix_subscriptions_due",
        "subscriptions",
        ["next_billing_at"],
        unique=False,
        postgresql_where=sa.text("next_billing_at IS NOT NULL"),
        sqlite_where=sa.text("next_billing_at IS NOT NULL"),
    )
    op.create_table(
        "invoices",
        sa.Column("id", KEY, nullable=False),
        sa.Column("reference_id", sa.String(length=160), nullable=False),
        sa.Column("subscription_id", KEY, nullable=False),
        sa.Column("period_number", sa.Integer(), nullable=False),
        sa.Column("period_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("period_end", sa.DateTime(timezone=True), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ring_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_charged_count", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("paid_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(status = 'paid') = (paid_at IS NOT NULL)", name=op.f("ck_invoices_paid_has_a_time")
        ),
        sa.CheckConstraint(
            "ring_at IS NULL OR status = 'open'", name=op.f("ck_invoices_rung_only_while_open")
        ),
        sa.CheckConstraint(
            "status IN ('open', 'paid', 'uncollectible', 'void')",
            name=op.f("ck_invoices_status_known"),
        ),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_invoices_amount_positive")),
        sa.ForeignKeyConstraint(
            ["subscription_id"], ["subscriptions.id"], name=op.f("fk_invoices_subscription_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invoices")),
        sa.UniqueConstraint("reference_id", name=op.f("uq_invoices_reference_id")),
        sa.UniqueConstraint(
            "subscription_id",
            "period_number",
            name=op.f("uq_invoices_subscription_id_period_number"),
        ),
    )
    op.create_index(
        "ix_invoices_ring",
        "invoices",
        ["ring_at"],
        unique=False,
        postgresql_where=sa.text("ring_at IS NOT NULL"),
        sqlite_where=sa.text("ring_at IS NOT NULL"),
    )
    op.create_table(
        "attempts",
        sa.Column("id", KEY, nullable=False),
        sa.Column("reference_id", sa.String(length=160), nullable=False),
        sa.Column("invoice_id", KEY, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("card_id", KEY, nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("test_mode", sa.Boolean(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("claims", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("gateway_id", sa.String(length=128), nullable=True),
        sa.Column("bearer", sa.LargeBinary(), nullable=True),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("look_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rechecks", sa.Integer(), nullable=False),
        sa.Column("unpaid_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sale_status", sa.Text(), nullable=True),
        sa.Column("sale_resolution", sa.Text(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "status IN ('prepared', 'not_charged') OR gateway_id IS NOT NULL",
            name=op.f("ck_attempts_sold_only_with_gateway_id"),
        ),
        sa.CheckConstraint(
            "status IN ('prepared', 'submitted', 'succeeded', 'declined', 'not_charged', 'surplus')",
            name=op.f("ck_attempts_status_known"),
        ),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_attempts_amount_positive")),
        sa.ForeignKeyConstraint(["card_id"], ["cards.id"], name=op.f("fk_attempts_card_id")),
        sa.ForeignKeyConstraint(
            ["invoice_id"], ["invoices.id"], name=op.f("fk_attempts_invoice_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("gateway_id", name=op.f("uq_attempts_gateway_id")),
        sa.UniqueConstraint("invoice_id", "number", name=op.f("uq_attempts_invoice_id_number")),
        sa.UniqueConstraint("reference_id", name=op.f("uq_attempts_reference_id")),
    )
    op.create_index(
        "ix_attempts_look",
        "attempts",
        ["look_at"],
        unique=False,
        postgresql_where=sa.text("look_at IS NOT NULL"),
        sqlite_where=sa.text("look_at IS NOT NULL"),
    )
    op.create_index(
        "uq_attempts_one_live",
        "attempts",
        ["invoice_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('prepared', 'submitted')"),
        sqlite_where=sa.text("status IN ('prepared', 'submitted')"),
    )
    op.create_index(
        "uq_attempts_one_succeeded",
        "attempts",
        ["invoice_id"],
        unique=True,
        postgresql_where=sa.text("status = 'succeeded'"),
        sqlite_where=sa.text("status = 'succeeded'"),
    )
    switches = sa.table(
        "switches", sa.column("name", sa.String()), sa.column("is_on", sa.Boolean())
    )
    op.bulk_insert(switches, [{"name": "sales", "is_on": True}])
    _make_history_append_only()


def _make_history_append_only() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("""
            CREATE FUNCTION refuse_to_rewrite_history() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'events is append-only'; END $$
        """)
        op.execute("""
            CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events
            FOR EACH STATEMENT EXECUTE FUNCTION refuse_to_rewrite_history()
        """)
        return
    for verb in ("UPDATE", "DELETE"):
        op.execute(f"""
            CREATE TRIGGER events_no_{verb.lower()} BEFORE {verb} ON events
            BEGIN SELECT RAISE(ABORT, 'events is append-only'); END
        """)
