"""Signatures of Standard Webhooks 1.0 (github.com/standard-webhooks/standard-webhooks, spec/).

Own code: fifteen lines of the standard library. The tests verify them with the reference library.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import Secret

PREFIX: Final = "whsec_"
SHORTEST, LONGEST, USUAL = 24, 64, 32
"""Bytes of a secret: the limits of the specification, and the size of a new one."""


def new_secret() -> Secret:
    return Secret(PREFIX + base64.b64encode(secrets.token_bytes(USUAL)).decode())


def read_secret(text: str) -> Secret:
    """Read a given secret. Raises InvalidInput on `secret`, without showing it."""
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("secret", f"must be {PREFIX} and base64") from None
    if not SHORTEST <= len(key) <= LONGEST:
        reason = f"has {len(key)} bytes; it must have {SHORTEST} to {LONGEST}"
        raise InvalidInput("secret", reason)
    return Secret(PREFIX + text.removeprefix(PREFIX))


def signed(keys: Sequence[Secret], event_id: str, at: int, body: bytes) -> dict[str, str]:
    """Return the three headers, with one signature for each key. `at`: seconds since the epoch, of
    this try.
    """
    content = f"{event_id}.{at}.".encode() + body
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(_signature(key, content) for key in keys),
    }


def _signature(key: Secret, content: bytes) -> str:
    bare = base64.b64decode(key.reveal().removeprefix(PREFIX))
    return "v1," + base64.b64encode(hmac.digest(bare, content, hashlib.sha256)).decode()
