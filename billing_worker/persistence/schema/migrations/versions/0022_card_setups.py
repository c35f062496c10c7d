"""The table of card setups is called so: it was `hosted_payments`.

Stop the workers before this migration: older ones do not know the new name.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_OLD, _NEW = "hosted_payments", "card_setups"


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        _make_anew()
    else:
        _rename()


def _rename() -> None:
    """Rename the table, then everything that carries its name."""
    op.rename_table(_OLD, _NEW)
    # A constraint's index takes the constraint's new name.
    constraints = sa.text("SELECT conname FROM pg_constraint WHERE conrelid = to_regclass(:table)")
    for name in _named(constraints):
        op.execute(f"ALTER TABLE {_NEW} RENAME CONSTRAINT {name} TO {_renamed(name)}")
    indexes = sa.text(
        "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = to_regclass(:table)"
    )
    for name in _named(indexes):
        op.execute(f"ALTER INDEX {name} RENAME TO {_renamed(name)}")
    sequence = f"{_OLD}_id_seq"
    op.execute(f"ALTER SEQUENCE IF EXISTS {sequence} RENAME TO {_renamed(sequence)}")


def _named(query: sa.TextClause) -> list[str]:
    names = op.get_bind().execute(query, {"table": _NEW}).scalars().all()
    return [name for name in names if _OLD in name]


def _make_anew() -> None:
    """SQLite cannot rename a constraint: make the table under its new name and copy the rows."""
    connection = op.get_bind()
    described = sa.text("SELECT sql FROM sqlite_master WHERE tbl_name = :name AND type = :type")
    indexes = connection.execute(described, {"name": _OLD, "type": "index"}).scalars().all()
    creation = connection.execute(described, {"name": _OLD, "type": "table"}).scalar_one()
    op.execute(_renamed(creation))
    op.execute(f"INSERT INTO {_NEW} SELECT * FROM {_OLD}")  # noqa: S608 - our own names
    op.drop_table(_OLD)
    for index in filter(None, indexes):  # those of unique constraints have no text of their own
        op.execute(_renamed(index))


def _renamed(text: str) -> str:
    return text.replace(_OLD, _NEW)
