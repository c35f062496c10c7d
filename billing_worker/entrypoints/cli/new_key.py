from __future__ import annotations

import click
from cryptography.fernet import Fernet


@click.command("new-key")
def new_key() -> None:
    """Print a new key for BILLING_VAULT_KEYS.

    \b
    Example:
      billing-worker new-key
    """
    click.echo(Fernet.generate_key().decode())
