"""Columns that two hunts for double charges and lost periods showed to be missing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _count_what_is_about_to_be_sold()
    _let_dead_cards_be_dead()
    _end_or_leave_subscriptions()
    _date_what_is_undecided_again()
    _date_what_the_gateway_said()


def _date_what_is_undecided_again() -> None:
    """Those of before get their date at their next recheck, within the hour."""
    instant = sa.DateTime(timezone=True)
    op.add_column("attempts", sa.Column("undecided_since", instant, nullable=True))


def _date_what_the_gateway_said() -> None:
    op.add_column("attempts", sa.Column("heard_at", sa.DateTime(timezone=True), nullable=True))


def _end_or_leave_subscriptions() -> None:
    instant = sa.DateTime(timezone=True)
    op.add_column("subscriptions", sa.Column("ends_at", instant, nullable=True))
    op.add_column("subscriptions", sa.Column("trouble", sa.Text(), nullable=True))
    op.add_column("subscriptions", sa.Column("plan_again_at", instant, nullable=True))
    # Left behind by a new card that paid for a suspended one that was about to be cancelled: the
    # sweep never found it again. It cancels it now.
    op.execute(
        "UPDATE subscriptions SET next_billing_at = cancels_at"
        " WHERE status IN ('trialing', 'active', 'past_due') AND NOT held"
        " AND next_billing_at IS NULL AND cancels_at IS NOT NULL"
        " AND (paid_through IS NULL OR cancels_at >= paid_through)"
    )
    leaving = sa.text("status = 'suspended' AND cancels_at IS NOT NULL")
    op.create_index(
        "ix_subscriptions_leaving",
        "subscriptions",
        ["cancels_at"],
        postgresql_where=leaving,
        sqlite_where=leaving,
    )


def _count_what_is_about_to_be_sold() -> None:
    counted = sa.text("status IN ('prepared', 'submitted', 'declined')")
    op.drop_index("ix_attempts_budget", "attempts")
    op.create_index(
        "ix_attempts_budget",
        "attempts",
        ["card_id", "submitted_at"],
        postgresql_where=counted,
        sqlite_where=counted,
    )


def _let_dead_cards_be_dead() -> None:
    """A card that was stored while its twin was being refused for good did not hear of it."""
    op.execute(
        """
        UPDATE cards SET
            unusable_reason = (SELECT min(twin.unusable_reason) FROM cards AS twin
                               WHERE twin.fingerprint = cards.fingerprint),
            declined_at = coalesce(declined_at, (SELECT max(twin.declined_at) FROM cards AS twin
                                                 WHERE twin.fingerprint = cards.fingerprint))
        WHERE unusable_reason IS NULL
          AND fingerprint IN (SELECT fingerprint FROM cards WHERE unusable_reason IS NOT NULL)
        """
    )
