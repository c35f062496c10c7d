from __future__ import annotations

from datetime import timedelta

import click

from billing_worker import config
from billing_worker.entrypoints.checks import run_checks
from billing_worker.entrypoints.cli.shared import json_option, print_json, settings_for


@click.command()
@click.option(
    "--max-age",
    type=click.IntRange(min=1),
    metavar="SECONDS",
    help="Fail if a sweep's last run is older than this, and than three of its intervals.",
)
@json_option
def check(*, max_age: int | None, as_json: bool) -> None:
    """Test every part that the worker needs. Exit status 1 if one of them fails.

    The parts are database, schema, book, clock, standby, Redis, sweeps, gateway, its look-up by
    reference, cardgate, vault keys and callbacks. The command writes nothing and moves no money.
    With --max-age it also notices that beat or all workers are down.

    \b
    Example:
      billing-worker check --max-age 600
    """
    settings = settings_for(*config.EVERYTHING)
    results = run_checks(settings, None if max_age is None else timedelta(seconds=max_age))
    if as_json:
        print_json([{"part": r.part, "ok": r.ok, "details": r.details} for r in results])
    else:
        for result in results:
            click.echo(f"{'ok  ' if result.ok else 'FAIL'}  {result.part}: {result.details}")
    if not all(result.ok for result in results):
        raise SystemExit(1)
