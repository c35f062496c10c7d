from __future__ import annotations

from typing import Any

import click

from billing_worker import config
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
)
from billing_worker.persistence import commands as rows
from billing_worker.services.commands.execute import FAILED, REFUSED, described


@click.command()
@click.option("--not-done", is_flag=True, help="Only refused and failed commands.")
@click.option("--reference", help="Only commands with this reference_id.")
@click.option("--message", help="Only the command with this Celery task id.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))
@json_option
def commands(
    *, not_done: bool, reference: str | None, message: str | None, limit: int, as_json: bool
) -> None:
    """List commands of other services, newest first: outcome, errors, answer.

    \b
    Example:
      billing-worker commands --not-done --limit 20
    """
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        found = [
            described(row)
            for row in rows.listed(
                connection,
                limit=limit,
                outcomes=(REFUSED, FAILED) if not_done else (),
                reference_id=reference,
                message_id=message,
            )
        ]
    if as_json:
        print_json(found)
        return
    columns = ("received_at", "task", "reference_id", "outcome", "errors")
    print_table("", columns, [[_cell(command[column]) for column in columns] for command in found])


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "\n".join(f"{error['field']}: {error['reason']}" for error in value)
    return value
