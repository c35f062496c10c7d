"""JSON that refuses objects with a repeated key."""

from __future__ import annotations

import json
from typing import Any


class KeyTwice(ValueError):
    """An object repeats a key. The message names the key."""


def loads(text: bytes | str) -> Any:
    """Parse JSON. Raises KeyTwice for a repeated key, because readers differ in which value they
    take.

    Raises ValueError for what is no JSON, RecursionError for what nests too deep.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise KeyTwice(f"the key {twice!r:.100} occurs twice")
    return found
