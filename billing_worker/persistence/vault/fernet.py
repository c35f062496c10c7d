from __future__ import annotations

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from billing_worker.domain.errors import KeysInDoubt, WrongKey, WrongPlace
from billing_worker.domain.secret import Place, Secret

_BOUND = b"\0"
"""Begins and ends the place in a plaintext. Older plaintexts have no place and begin otherwise."""


class FernetVault:
    """Encrypts card tokens and bearers at rest, each together with the place it belongs to.

    The first key encrypts; every key decrypts. A new key goes to the front. An old key is removed
    when nothing is encrypted with it any more (`billing-worker vault rotate`).
    """

    def __init__(self, keys: Secret) -> None:
        """`keys`: comma-separated url-safe base64 Fernet keys. Raises ValueError if one is
        invalid.
        """
        fernets = [Fernet(key.strip()) for key in keys.reveal().split(",")]
        self._newest = fernets[0]
        self._fernet = MultiFernet(fernets)
        self._in_doubt = False

    def doubt(self) -> None:
        """Refuse to encrypt until a stored value was decrypted."""
        self._in_doubt = True

    def lock(self, secret: Secret, place: Place) -> bytes:
        """Encrypt. Raises KeysInDoubt after `doubt`, until a stored value was decrypted."""
        if self._in_doubt:
            raise KeysInDoubt("BILLING_VAULT_KEYS open nothing of what is stored")
        return self._fernet.encrypt(_bound(place) + secret.reveal().encode())

    def unlock(self, locked: bytes, place: Place) -> Secret:
        """Decrypt. Raises WrongKey if no key fits, WrongPlace if it was encrypted for another
        place. A value of an older version is bound to no place, until `renewed` binds it.
        """
        try:
            plain = self._fernet.decrypt(locked)
        except InvalidToken:
            raise WrongKey("what is stored opens with none of BILLING_VAULT_KEYS") from None
        self._in_doubt = False
        if plain.startswith(_BOUND) and not plain.startswith(_bound(place)):
            raise WrongPlace(f"it is stored as {place} and was encrypted for something else")
        return Secret(plain.removeprefix(_bound(place)).decode())

    def renewed(self, locked: bytes, place: Place) -> bytes | None:
        """Encrypt with the newest key, bound to its place. None: it already is. Raises as `unlock`."""
        secret = self.unlock(locked, place)
        try:
            is_new = self._newest.decrypt(locked).startswith(_BOUND)
        except InvalidToken:
            is_new = False
        return None if is_new else self.lock(secret, place)


def _bound(place: Place) -> bytes:
    return _BOUND + place.encode() + _BOUND
