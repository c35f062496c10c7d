from __future__ import annotations

import click

from billing_worker import config
from billing_worker.addresses import shown
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_json,
    settings_for,
)
from billing_worker.persistence.schema import migrate as schema


@click.command()
@json_option
def migrate(*, as_json: bool) -> None:
    """Bring the database to this version's schema. It is safe to run it again, and twice at once.

    \b
    Example:
      billing-worker migrate
    """
    settings = settings_for(*config.DATABASE)
    with open_store(settings, migrated=False) as store:
        before, after = schema.migrate(store)
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        click.echo(f"{shown(settings.database_url)} is already at {after}.")
    else:
        click.echo(f"{shown(settings.database_url)}: {before or 'empty'} -> {after}.")
