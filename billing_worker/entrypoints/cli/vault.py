"""`billing-worker vault check | rotate`."""

from __future__ import annotations

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.entrypoints.cli.shared import (
    by_option,
    json_option,
    open_store,
    print_json,
    settings_for,
    why_option,
)
from billing_worker.entrypoints.cli.vault_keys import open_vault
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.operators.vault import Inspected, Lock, inspect
from billing_worker.services.operators.vault import rotate as rotate_all

_IN_WORDS = {
    Lock.NEWEST: "encrypted with the newest key and bound to its row",
    Lock.OLDER: "encrypted with an older key, or bound to no row: run `vault rotate`",
    Lock.NO_KEY: "decrypts with no key: put its key back at the end of BILLING_VAULT_KEYS",
    Lock.ELSEWHERE: "was encrypted for another row: somebody has copied it",
}


@click.group()
def vault() -> None:
    """Test the encryption of stored secrets; encrypt them with a new key."""


@vault.command()
@json_option
def check(*, as_json: bool) -> None:
    """Decrypt every stored secret. Exit status 1 if one does not decrypt. Writes nothing.

    \b
    Example:
      billing-worker vault check
    """
    settings = settings_for(*config.DATABASE, *config.VAULT)
    with open_store(settings) as store:
        found = inspect(store, FernetVault(settings.vault_keys), _progress)
    _print(found, as_json=as_json)


@vault.command()
@why_option
@by_option
@json_option
def rotate(*, why: str, by: str, as_json: bool) -> None:
    """Encrypt every stored secret with the newest key. Charges go on meanwhile.

    Put a new key first in BILLING_VAULT_KEYS, restart all processes, then run this. Afterwards
    remove the old key. If it is interrupted, run it again. It also binds secrets of an older
    version to their rows.

    \b
    Example:
      billing-worker vault rotate --why "yearly rotation"
    """
    settings = settings_for(*config.DATABASE, *config.VAULT)
    with open_store(settings) as store:
        keys = open_vault(settings, store)
        by = f"operator:{by}"
        renewed = rotate_all(store, keys, SystemClock(), _progress, by=by, why=why)
        click.echo(f"{renewed.total(Lock.OLDER)} encrypted anew", err=True)
        _print(inspect(store, keys, _progress), as_json=as_json)


def _progress(called: str, done: int) -> None:
    click.echo(f"{called}: {done}", err=True)


def _print(found: Inspected, *, as_json: bool) -> None:
    if as_json:
        print_json({"secrets": found.as_data(), "broken": found.broken})
    else:
        for lock, words in _IN_WORDS.items():
            if number := found.total(lock):
                click.echo(f"{number} {words}")
        for line in found.broken:
            click.echo(line)
    if not found.is_good:
        raise SystemExit(1)
