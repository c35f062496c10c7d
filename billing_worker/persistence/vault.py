from __future__ import annotations

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from billing_worker.domain.errors import KeysInDoubt, WrongKey
from billing_worker.domain.secret import Secret


class FernetVault:
    """Encrypts card tokens and bearers at rest.

    The first key encrypts; every key decrypts. A new key goes to the front. An old key is removed
    when nothing is encrypted with it any more.
    """

    def __init__(self, keys: Secret) -> None:
        """`keys`: comma-separated url-safe base64 Fernet keys. Raises ValueError if one is
        invalid.
        """
        self._fernet = MultiFernet([Fernet(key.strip()) for key in keys.reveal().split(",")])
        self._in_doubt = False

    def doubt(self) -> None:
        """Refuse to encrypt until a stored value was decrypted."""
        self._in_doubt = True

    def lock(self, secret: Secret) -> bytes:
        """Encrypt. Raises KeysInDoubt after `doubt`, until a stored value was decrypted."""
        if self._in_doubt:
            raise KeysInDoubt("BILLING_VAULT_KEYS open nothing of what is stored")
        return self._fernet.encrypt(secret.reveal().encode())

    def unlock(self, locked: bytes) -> Secret:
        """Decrypt. Raises WrongKey if no key fits."""
        try:
            secret = Secret(self._fernet.decrypt(locked).decode())
        except InvalidToken:
            raise WrongKey("what is stored opens with none of BILLING_VAULT_KEYS") from None
        self._in_doubt = False
        return secret
