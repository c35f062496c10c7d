"""Free text for the history: stored without what must never be stored."""

from __future__ import annotations

from billing_worker.domain.errors import InvalidInput
from billing_worker.gateway.redaction import legible, redact

LONGEST_REASON = 1_000


def required(field: str, text: str | None) -> str:
    """Return the text. Raises InvalidInput on `field` if it is empty or longer than `LONGEST`
    characters.
    """
    said = legible(redact((text or "").strip()))
    if not said:
        raise InvalidInput(field, "must not be empty")
    if len(said) > LONGEST_REASON:
        raise InvalidInput(field, f"must have at most {LONGEST_REASON} characters")
    return said
