"""Details of decisions and events, for people. What says nothing is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = 16


def in_lines(details: Mapping[str, Any]) -> Iterator[str]:
    """Yield `name  value` of the details of a `lifecycle.Outcome`; of changes, `before -> after`."""
    for name, value in details.items():
        if name == "changes":
            yield from (_line(term, _change(*pair)) for term, pair in value.items())
        elif name == "skipped_periods" and value:
            yield _line(name, f"{value[0]} to {value[1]}")
        elif words := _words(value):
            yield _line(name, words)


def _line(name: str, words: str) -> str:
    return f"  {name.replace('_', ' '):{_WIDTH}} {words}"


def _change(before: Any, after: Any) -> str:
    return f"{_words(before) or 'none'} -> {_words(after) or 'none'}"


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def as_words(data: Mapping[str, Any]) -> str:
    """Return `name=value, …` of everything that has a value, to show an event's data."""
    said = {name: value for name, value in data.items() if value not in (None, [], {})}
    return ", ".join(f"{name}={_word(name, value)}" for name, value in said.items())


def _word(name: str, value: Any) -> str:
    if name == "changes":
        return "; ".join(f"{term} {_change(*pair)}" for term, pair in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
