"""Checks who sent a callback. Its content is never trusted (gateway.md §5)."""

from __future__ import annotations

import base64
import hashlib
import hmac

from billing_worker.domain.secret import Secret


def signature(body: bytes, key: Secret) -> bytes:
    """Return the `X-Signature` of a raw body: `base64(sha1(key + body + key))`.

    It needs the received bytes: PHP escapes slashes, so a body that is parsed and written again
    differs.
    """
    around = key.reveal().encode()
    # The gateway prescribes SHA-1. A key on both sides prevents length extension.
    digest = hashlib.sha1(around + body + around)  # noqa: S324
    return base64.b64encode(digest.digest())


def is_signed(body: bytes, given: str | None, key: Secret) -> bool:
    """Whether the holder of `key` has signed exactly these bytes. Compares in constant time."""
    if not key.reveal() or not given or not given.isascii():
        return False
    return hmac.compare_digest(given.encode(), signature(body, key))
