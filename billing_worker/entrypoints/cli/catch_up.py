from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.catch_up import AGE_CAP
from billing_worker.domain.catch_up_policy import Policy
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.entrypoints.cli.shared import (
    by_option,
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
    why_option,
)
from billing_worker.services.invoicing import catch_up as service
from billing_worker.services.invoicing.catch_up import Answer, Caps, Line

_COLUMNS = ("invoice", "customer", "amount", "action", "at", "rule")
SHOWN_PERIODS = 200


@click.group("catch-up")
def catch_up() -> None:
    """Decide about periods that were not billed in time.

    The sweep follows each subscription's own policy. `plan` shows what it is going to do; `apply`
    does it at once, up to a limit. --policy also decides about periods that are held.
    """


class _PolicyType(click.ParamType[Policy]):
    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> Policy:
        try:
            return Policy.parse(str(value))
        except InvalidInput as error:
            self.fail(error.reason, param, ctx)


class _CapType(click.ParamType[Money]):
    name = "amount currency"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> Money:
        amount, _, currency = str(value).partition(" ")
        try:
            return Money.parse(amount, currency)
        except InvalidInput as error:
            self.fail(f"{error}, as in '500.00 USD'", param, ctx)


policy_option = click.option(
    "--policy",
    type=_PolicyType(),
    help="For all periods, held ones too: collect_latest, collect_all:DAYS or"
    " forgive_older_than:DAYS. Default: each subscription's own; held periods stay held.",
)
age_option = click.option(
    "--max-age",
    "max_age",
    type=click.IntRange(1, 3650),
    default=AGE_CAP.days,
    show_default=True,
    help="Days. An older period is held instead of collected.",
)


def _answer(policy: Policy | None, max_age: int) -> Answer:
    try:
        return Answer(policy, timedelta(days=max_age))
    except InvalidInput as error:
        raise click.ClickException(str(error)) from None


@catch_up.command()
@policy_option
@age_option
@json_option
def plan(policy: Policy | None, max_age: int, *, as_json: bool) -> None:
    """Show who is charged how much, when, and by which rule. Changes nothing.

    \b
    Example:
      billing-worker catch-up plan --policy collect_all:7
    """
    with open_store(settings_for(*config.DATABASE)) as store:
        lines = list(service.plan(store, SystemClock().now(), _answer(policy, max_age)))
    if as_json:
        print_json({"lines": [line.as_dict() for line in lines], "totals": _totals(lines)})
    else:
        _print(lines)


@catch_up.command()
@policy_option
@age_option
@click.option("--max-count", type=click.IntRange(min=0), help="Most debits in all.")
@click.option(
    "--max-amount",
    "max_amounts",
    type=_CapType(),
    multiple=True,
    help="Most money, such as '500.00 USD'; once per currency. Other currencies are not debited.",
)
@by_option
@why_option
@json_option
def apply(
    policy: Policy | None,
    max_age: int,
    max_count: int | None,
    max_amounts: tuple[Money, ...],
    by: str,
    why: str,
    *,
    as_json: bool,
) -> None:
    """Do what `plan` shows, in its order. Stops before a customer who would exceed a limit.

    \b
    Example:
      billing-worker catch-up apply --max-count 100 --why "outage of May 3"
    """
    caps = Caps(max_count, {money.currency: money for money in max_amounts})
    answer = _answer(policy, max_age)
    with open_store(settings_for(*config.DATABASE), decides=True) as store:
        try:
            done = service.apply(store, SystemClock(), answer, caps, by=f"operator:{by}", why=why)
        except InvalidInput as error:
            raise click.ClickException(error.reason) from None
    if as_json:
        print_json(
            {
                "lines": [line.as_dict() for line in done.lines],
                "totals": _totals(done.lines),
                "complete": done.complete,
            }
        )
        return
    _print(done.lines)
    if not done.complete:
        click.echo("A cap was reached: the rest is as it was. Apply again to go on.")


def _totals(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Return totals as [{action, currency, count, amount}]."""
    sums: dict[tuple[str, str], list[Money]] = defaultdict(list)
    for line in lines:
        if line.money is not None:
            sums[str(line.planned.action), line.money.currency].append(line.money)
    return [
        {
            "action": action,
            "currency": currency,
            "count": len(amounts),
            "amount": f"{sum(amounts, Money.zero(currency)).amount:f}",
        }
        for (action, currency), amounts in sorted(sums.items())
    ]


def _cells(line: Line) -> list[str | None]:
    planned = line.planned
    at = planned.at.strftime("%Y-%m-%d %H:%MZ") if planned.at else None
    money = str(line.money) if line.money else planned.reason
    return [line.invoice, line.customer, money, str(planned.action), at, planned.rule]


def _print(lines: list[Line]) -> None:
    print_table("Periods", _COLUMNS, [_cells(line) for line in lines[:SHOWN_PERIODS]])
    if len(lines) > SHOWN_PERIODS:
        click.echo(f"… and {len(lines) - SHOWN_PERIODS} more: --json prints all of them.")
    totals = _totals(lines)
    columns = ("action", "count", "amount", "currency")
    print_table("Totals", columns, [[total[column] for column in columns] for total in totals])
