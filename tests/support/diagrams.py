"""Mermaid diagrams made from the code's own tables.

`python -m tests.support.diagrams` prints them for `docs/architecture.md`; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from sqlalchemy import Table

from billing_worker.domain import attempt, invoice, subscription
from billing_worker.persistence.schema.tables import metadata

SHOWN = ("customers", "cards", "subscriptions", "invoices", "attempts", "card_setups")
"""Tables of the entity diagram: what a reader meets first."""


def states(table: Mapping[StrEnum, frozenset[StrEnum]], starts: tuple[StrEnum, ...]) -> str:
    lines = ["stateDiagram-v2", *(f"    [*] --> {start}" for start in starts)]
    for state, following in table.items():
        lines += [f"    {state} --> {after}" for after in sorted(following)]
        if not following:
            lines.append(f"    {state} --> [*]")
    return "\n".join(lines)


def entities() -> str:
    tables = {name: metadata.tables[name] for name in SHOWN if name in metadata.tables}
    lines = ["erDiagram"]
    for table in tables.values():
        lines += sorted(_references(table, set(tables)))
    return "\n".join(lines)


def _references(table: Table, shown: set[str]) -> set[str]:
    return {
        f"    {key.column.table.name} ||--o{{ {table.name} : {column.name}"
        for column in table.columns
        for key in column.foreign_keys
        if key.column.table.name in shown
    }


def all_diagrams() -> dict[str, str]:
    """Each diagram's text by what it shows."""
    a, i, s = attempt.AttemptStatus, invoice.InvoiceStatus, subscription.SubscriptionStatus
    return {
        "attempt": states(attempt.TRANSITIONS, (a.PREPARED,)),
        "invoice": states(invoice.TRANSITIONS, (i.OPEN, i.VOID)),
        "subscription": states(subscription.TRANSITIONS, (s.TRIALING, s.ACTIVE)),
        "entities": entities(),
    }


if __name__ == "__main__":
    for name, diagram in all_diagrams().items():
        print(f"<!-- {name} -->\n```mermaid\n{diagram}\n```\n")
