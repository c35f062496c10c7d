"""Routes for other systems: each caller shows a bearer token of `BILLING_API_TOKENS`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from flask import Blueprint, Response, jsonify, request

from billing_worker.domain.secret import Secret


def only_with_token(routes: Blueprint, tokens: Secret) -> Blueprint:
    """Refuse callers without a token. Without any token in the settings every route answers 503."""
    known = [token for token in tokens.reveal().split(",") if token]

    @routes.before_request
    def refuse_strangers() -> tuple[Response, int] | None:
        if not known:
            return jsonify(error="off: BILLING_API_TOKENS is not set"), 503
        if not _is_known(request.headers.get("Authorization", ""), known):
            return jsonify(error="needs a bearer token of BILLING_API_TOKENS"), 401
        return None

    return routes


def _is_known(header: str, tokens: Sequence[str]) -> bool:
    """Compare with every token, each in constant time."""
    scheme, _, given = header.partition(" ")
    text = given.strip().encode()
    matches = [hmac.compare_digest(text, token.strip().encode()) for token in tokens]
    return scheme.lower() == "bearer" and any(matches)
