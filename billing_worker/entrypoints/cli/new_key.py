from __future__ import annotations

import click
from cryptography.fernet import Fernet


@click.command("new-key")
def new_key() -> None:
    """Print a fresh key for BILLING_VAULT_KEYS."""
    click.echo(Fernet.generate_key().decode())
