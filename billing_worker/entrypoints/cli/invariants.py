from __future__ import annotations

from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_json,
    settings_for,
)
from billing_worker.entrypoints.worker.sweeps import intervals
from billing_worker.services.monitoring.inspection import NAMED, Finding, Leeway, report


@click.command()
@json_option
def invariants(*, as_json: bool) -> None:
    """Ask the whole book whether it contradicts itself. Exit status 1 if it does.

    The worker asks the same questions all the time and alerts. This command writes nothing; on a
    large book it takes minutes.

    \b
    Example:
      billing-worker invariants
    """
    settings = settings_for(*config.DATABASE)
    leeway = Leeway(settings.timings, intervals(settings))
    with open_store(settings) as store:
        findings = report(store, leeway, SystemClock().now())
    if as_json:
        print_json([_as_json(finding) for finding in findings])
    else:
        for finding in findings:
            _print(finding)
    if any(finding.broken for finding in findings):
        raise SystemExit(1)


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "invariant": finding.invariant.name,
        "says": finding.invariant.says,
        "holds": None if finding.not_judged else not finding.broken,
        "not_judged": finding.not_judged,
        "broken_by": sorted(finding.broken.values()),
        "look": _look(finding),
    }


def _look(finding: Finding) -> str | None:
    if not finding.broken:
        return None
    return finding.invariant.look.format(reference=min(finding.broken.values()))


def _print(finding: Finding) -> None:
    if finding.not_judged:
        click.echo(f"-     {finding.invariant.says} (not judged: {finding.not_judged})")
    elif not finding.broken:
        click.echo(f"ok    {finding.invariant.says}")
    else:
        references = sorted(finding.broken.values())
        more = f" and {len(references) - NAMED} more" if len(references) > NAMED else ""
        click.echo(f"FAIL  {finding.invariant.says}")
        click.echo(f"      broken by {', '.join(references[:NAMED])}{more}")
        click.echo(f"      look: {_look(finding)}")
