"""What the code decides on is no text that a person reads: an order to void, and a possible sale."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

_VOID_IF_UNPAID = "void if it ends unpaid"
_MAYBE_SOLD = (
    "found at the gateway, and restored books (or moved ones) cannot tell whether it was sold"
)


def upgrade() -> None:
    op.add_column("invoices", _no_by_default("void_if_unpaid"))
    op.add_column("attempts", _no_by_default("maybe_sold"))
    connection = op.get_bind()
    connection.execute(
        sa.text("UPDATE invoices SET void_if_unpaid = true WHERE reason = :reason"),
        {"reason": _VOID_IF_UNPAID},
    )
    connection.execute(
        sa.text(
            "UPDATE attempts SET maybe_sold = true WHERE status = 'prepared'"
            " AND invoice_id IN (SELECT id FROM invoices WHERE reason = :reason)"
        ),
        {"reason": _MAYBE_SOLD},
    )


def _no_by_default(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false())
