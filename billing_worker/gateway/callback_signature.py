"""Callbacks: who sent them. What they say is never believed (gateway.md §5)."""

from __future__ import annotations

import base64
import hashlib
import hmac

from billing_worker.domain.secret import Secret


def signature(body: bytes, key: Secret) -> bytes:
    """What `X-Signature` has to be for these raw bytes: `base64(sha1(key + body + key))`.

    Of the bytes as they came: PHP escapes slashes, so a body parsed and written again differs.
    """
    around = key.reveal().encode()
    # SHA-1 is what the gateway prescribes; a key on both sides leaves no length extension.
    digest = hashlib.sha1(around + body + around)  # noqa: S324
    return base64.b64encode(digest.digest())


def is_signed(body: bytes, given: str | None, key: Secret) -> bool:
    """Whether the holder of `key` has signed exactly these bytes. Takes constant time."""
    if not key.reveal() or not given or not given.isascii():
        return False
    return hmac.compare_digest(given.encode(), signature(body, key))
