"""What is stored encrypted: the keys, and every column that they encrypt."""

from billing_worker.persistence.vault.fernet import FernetVault

__all__ = ["FernetVault"]
