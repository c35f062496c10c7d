"""The vault keys, for commands that encrypt or decrypt."""

from __future__ import annotations

import click
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.config import Settings
from billing_worker.persistence.store import AWAY, Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.charging.vault_keys import try_keys
from billing_worker.services.ports import Vault


def open_vault(settings: Settings, store: Store) -> FernetVault:
    """Return the vault. Raises ClickException if its keys open nothing of what is stored."""
    vault = FernetVault(settings.vault_keys)
    require_keys(store, vault)
    return vault


def require_keys(store: Store, vault: Vault) -> None:
    """Raises ClickException if the keys open nothing of what is stored: what they encrypt, nobody may
    open later.
    """
    with store.reading() as connection:
        found = try_keys(connection, vault)
    if found.open_nothing:
        raise click.ClickException(str(found))


def require_keys_if_known(settings: Settings) -> None:
    """The same for a process that also starts while the database is away, or not migrated yet."""
    with Store(settings.database_url) as store:
        try:
            require_keys(store, FernetVault(settings.vault_keys))
        except (*AWAY, SQLAlchemyError):
            return
