"""`billing-worker subscriptions dunning`."""

from __future__ import annotations

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.dunning import POLICIES
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.shared import (
    by_option,
    json_option,
    open_store,
    print_json,
    settings_for,
    why_option,
)
from billing_worker.services.dunning import choose_policy


@click.command()
@click.argument("reference_id")
@click.argument("policy", type=click.Choice(list(POLICIES)))
@by_option
@why_option
@json_option
def dunning(reference_id: str, policy: str, by: str, why: str, *, as_json: bool) -> None:
    """Choose the schedule of retries after a failed charge.

    \b
    Example:
      billing-worker subscriptions dunning sub-1 slow --why "customer asked"
    """
    with open_store(settings_for(*config.DATABASE), decides=True) as store:
        try:
            done = choose_policy(
                store,
                SystemClock(),
                subscription_reference=reference_id,
                policy=policy,
                by=f"operator:{by}",
                why=why,
            )
        except InvalidInput as error:
            if as_json:
                print_json({"error": {"field": error.field, "reason": error.reason}})
                raise SystemExit(1) from None
            raise click.ClickException(str(error)) from None
    ladder = POLICIES[policy]
    if as_json:
        print_json(done | {"delays_days": ladder.delays_days, "end": ladder.end})
        return
    days = ", ".join(map(str, ladder.delays_days))
    click.echo(f"{reference_id}: retries after {days} days, then {ladder.end}.")
