from __future__ import annotations

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from billing_worker.domain.errors import WrongKey
from billing_worker.domain.secret import Secret


class FernetVault:
    """Encrypts card tokens and bearers at rest.

    The first key encrypts, all of them decrypt: a new key is put in front, and an old one is
    taken away once nothing is encrypted with it any more.
    """

    def __init__(self, keys: Secret) -> None:
        """`keys`: comma-separated url-safe base64 Fernet keys. Raises ValueError for bad ones."""
        self._fernet = MultiFernet([Fernet(key.strip()) for key in keys.reveal().split(",")])

    def lock(self, secret: Secret) -> bytes:
        return self._fernet.encrypt(secret.reveal().encode())

    def unlock(self, locked: bytes) -> Secret:
        """Raises WrongKey when none of the keys opens it."""
        try:
            return Secret(self._fernet.decrypt(locked).decode())
        except InvalidToken:
            raise WrongKey("what is stored opens with none of BILLING_VAULT_KEYS") from None
