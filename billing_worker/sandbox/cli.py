"""`billing-worker sandbox`: the practice gateway as a separate program."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import get_args

import click
from rich.console import Console
from rich.table import Table

from billing_worker.clock import SystemClock
from billing_worker.sandbox.behaviour import Behaviour, DuplicateCreate, SecondSale
from billing_worker.sandbox.callbacks import CallbackSender
from billing_worker.sandbox.card_outcomes import token_table
from billing_worker.sandbox.gateway import SandboxGateway
from billing_worker.sandbox.server import serve

_DEFAULT = Behaviour()


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8088,
    show_default=True,
    help="0 lets the system choose.",
)
@click.option(
    "--latency",
    type=float,
    default=_DEFAULT.latency_seconds,
    show_default=True,
    help="Seconds added to every answer.",
)
@click.option(
    "--lifetime",
    type=float,
    default=_DEFAULT.lifetime_seconds,
    show_default=True,
    help="Seconds until an undecided invoice expires.",
)
@click.option(
    "--later",
    type=float,
    default=_DEFAULT.later_seconds,
    show_default=True,
    help='Seconds that "later" means in the token table.',
)
@click.option(
    "--duplicates",
    type=click.Choice(get_args(DuplicateCreate)),
    default=_DEFAULT.duplicate_create,
    show_default=True,
    help="Answer to a create whose reference_id is known.",
)
@click.option(
    "--second-sale",
    type=click.Choice(get_args(SecondSale)),
    default=_DEFAULT.second_sale,
    show_default=True,
    help="Answer to a second sale of one invoice; `charge` takes the money twice.",
)
@click.option("--callbacks/--no-callbacks", default=False, show_default=True)
@click.option("--callback-secret", default="sandbox-secret", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of tables.")
def sandbox(
    *,
    host: str,
    port: int,
    latency: float,
    lifetime: float,
    later: float,
    duplicates: DuplicateCreate,
    second_sale: SecondSale,
    callbacks: bool,
    callback_secret: str,
    as_json: bool,
) -> None:
    """Serve a practice gateway until SIGINT or SIGTERM.

    \b
    Example:
      billing-worker sandbox --port 8088 --callbacks
    """
    try:
        behaviour = Behaviour(
            latency_seconds=latency,
            lifetime_seconds=lifetime,
            later_seconds=later,
            duplicate_create=duplicates,
            second_sale=second_sale,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    gateway = SandboxGateway(
        behaviour,
        SystemClock().now,
        callback_secret=callback_secret,
        first_number=int(SystemClock().now().timestamp()) * 1000,
    )
    introduce = _print_json if as_json else _print_tables
    with CallbackSender(gateway) if callbacks else nullcontext():
        try:
            serve(gateway, host, port, lambda url: introduce(url, gateway))
        except OSError as error:
            raise click.ClickException(f"{host}:{port}: {error.strerror}") from None


def _facts(url: str, gateway: SandboxGateway) -> dict[str, str]:
    return {
        "url": url,
        "username": gateway.username,
        "password": gateway.password,
        "callback_secret": gateway.callback_secret,
    }


def _print_json(url: str, gateway: SandboxGateway) -> None:
    tokens = [{"token": token, "meaning": meaning} for token, meaning in token_table()]
    click.echo(json.dumps({**_facts(url, gateway), "tokens": tokens}))


def _print_tables(url: str, gateway: SandboxGateway) -> None:
    facts = Table(show_header=False, box=None)
    for name, value in _facts(url, gateway).items():
        facts.add_row(name, value)
    tokens = Table("card token", "meaning")
    for row in token_table():
        tokens.add_row(*row)
    console = Console()
    console.print(tokens, facts, sep="\n")
