"""Two dates are renamed: when a worker is woken for an invoice, when the gateway is polled next.

The indexes keep their names. Stop the workers before this migration: older ones do not know the
new names.
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("invoices", "ring_at", new_column_name="enqueue_at")
    op.alter_column("attempts", "look_at", new_column_name="next_poll_at")
    op.alter_column("hosted_payments", "look_at", new_column_name="next_poll_at")
