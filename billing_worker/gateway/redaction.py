"""Removes secrets from texts before they are stored or logged.

It works on text, not on parsed JSON: a truncated answer, or an error page that echoes our request,
can hold secrets too.

It runs on each answer, and a stranger may send any text. So it takes linear time, and every pattern
starts with a literal or one class of characters, which `re` finds quickly.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Collection, Iterable
from typing import Any, Final
from urllib.parse import quote

from billing_worker.domain.secret import Secret, passes_luhn

HIDDEN: Final = "***"

LONGEST_EXCERPT: Final = 4000
"""In characters, as `WireCall.answer` promises."""

_SECRET_NAME: Final = re.compile(
    r".*(?:token|passw(?:or)?d|secret|authorization|api[_-]?key)"
    r"|cvv2?|cvc2?|pan|card_?number",
    re.IGNORECASE,
)
# The address of a page and its parameters in an answer: anybody who has them may pay there.
_PAGE_NAME: Final = re.compile(r"action|params|sid|hpp_?url", re.IGNORECASE)
# `"name":`, and `\"name\":` as it looks in JSON inside a JSON string (`callback_logs`).
_NAME: Final = re.compile(r'"([\w-]{1,64}+)\\{0,3}+"\s{0,9}+:\s{0,9}+')
# A string up to its own kind of quote, a number, a list up to its first end, or an object up to its
# first end outside of a string.
# Not null, true and false: it is no secret whether there is a token.
_VALUE: Final = re.compile(
    r'(?P<quote>\\{0,3}")(?:(?!(?P=quote))(?:\\.|.))*(?P=quote)?'
    r"|-?[0-9][^\s,}\]]*|\[[^\]]*\]?"
    r'|\{(?:"(?:[^"\\]|\\.)*+"?|\\"(?:[^"\\]|\\[^"])*+(?:\\")?|[^}"\\]|\\)*+\}?',
    re.DOTALL,
)
_FORM_VALUE: Final = re.compile(r"=[^&\s\"'<>\\]+")
_LAST_WORD: Final = re.compile(r"[\w-]+\Z")
_AUTHORIZATION: Final = re.compile(r"[Bb](?:earer|asic|EARER|ASIC)\s{1,9}[^\s\"'<>,;\\]+")
# `eyJ` is the base64 of `{"`, with which every JSON web token starts.
_JWT: Final = re.compile(r"eyJ[\w-]{6,}[\w.=*+/-]*")
_DIGITS: Final = re.compile(r"[0-9][0-9 -]{11,}[0-9]")
# 13 to 19 digits, or the groups of digits that are printed on cards.
_CARD_NUMBER: Final = re.compile(
    r"(?<![0-9])(?:[0-9]{13,19}"
    r"|[0-9]{4}(?P<gap>[ -])[0-9]{4}(?P=gap)[0-9]{4}(?P=gap)[0-9]{4}"
    r"|[0-9]{4}[ -][0-9]{6}[ -][0-9]{5})(?![0-9])"
)
# PostgreSQL accepts no NUL, and a terminal executes the others.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redact(text: str, secrets: Iterable[Secret] = ()) -> str:
    """Return `text` without the given secrets and without anything that looks like a secret."""
    if "&quot;" in text or "&#34;" in text:
        text = html.unescape(text)
    text = hide(text, secrets)
    text = _hide_named_values(text)
    text = _FORM_VALUE.sub(_hide_form_value, text)
    text = _AUTHORIZATION.sub(HIDDEN, text)
    text = _JWT.sub(HIDDEN, text)
    return _DIGITS.sub(_hide_card_numbers, text)


def hide(text: str, secrets: Iterable[Secret]) -> str:
    """Return `text` without the given secrets, otherwise unchanged."""
    for secret in secrets:
        for spelling in _spellings(secret.reveal()):
            text = text.replace(spelling, HIDDEN)
    return text


def stated(body: bytes, names: Collection[str]) -> str:
    """Return only the fields of an answer that have one of these names, as JSON.

    It is for answers about a card whose token is not at hand: their free text may quote the token.
    """
    try:
        said = json.dumps(_named(json.loads(body), names), ensure_ascii=False)
    except (ValueError, RecursionError):
        return f"no JSON, {len(body)} bytes"
    return legible(redact(said))[:LONGEST_EXCERPT]


def _named(value: Any, names: Collection[str]) -> Any:
    if isinstance(value, list):
        return [kept for item in value if (kept := _named(item, names)) not in ({}, [], None)]
    if not isinstance(value, dict):
        return None
    found = {
        name: item if name in names and not isinstance(item, dict | list) else _named(item, names)
        for name, item in value.items()
    }
    return {name: item for name, item in found.items() if item not in ({}, [], None)}


def redact_body(value: Any, secrets: Iterable[Secret] = ()) -> Any:
    """Return a JSON value with hidden secrets, and with decimals as text for any JSON column."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if _names_a_secret(name) else redact_body(item, secrets)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [redact_body(item, secrets) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    return redact(str(value), secrets)


def excerpt(body: bytes, secrets: Iterable[Secret] = ()) -> str:
    """Return the start of an answer, safe to store and show.

    The text is redacted before it is cut: half a secret at the cut would not be recognised.
    """
    return legible(redact(body.decode("utf-8", "replace"), secrets))[:LONGEST_EXCERPT]


def legible(text: str) -> str:
    """Return `text` with each character replaced that a database or a terminal cannot take."""
    if text.isprintable():
        return text
    encodable = text.encode("utf-8", "replace").decode("utf-8")
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", encodable)


def _spellings(secret: str) -> set[str]:
    """Return the secret as it looks raw, in the JSON of Python and of PHP, and in a URL."""
    if secret.isascii() and secret.isalnum():
        return {secret}
    in_json = json.dumps(secret)[1:-1]
    spellings = {secret, in_json, in_json.replace("/", r"\/"), quote(secret, safe="")}
    return spellings - {""}


def _hide_named_values(text: str) -> str:
    shown = []
    done = 0
    for name in _NAME.finditer(text):
        if name.start() < done or not _is_hidden_in_answers(name[1]):
            continue
        if value := _VALUE.match(text, name.end()):
            quote_mark = value["quote"] or '"'
            shown += [text[done : name.end()], quote_mark, HIDDEN, quote_mark]
            done = value.end()
    return "".join([*shown, text[done:]])


def _hide_form_value(value: re.Match[str]) -> str:
    before = value.string[max(0, value.start() - 64) : value.start()]
    name = _LAST_WORD.search(before)
    return f"={HIDDEN}" if name and _names_a_secret(name[0]) else value[0]


@functools.lru_cache(maxsize=1024)
def _names_a_secret(name: str) -> bool:
    return _SECRET_NAME.fullmatch(name) is not None


@functools.lru_cache(maxsize=1024)
def _is_hidden_in_answers(name: str) -> bool:
    return _names_a_secret(name) or _PAGE_NAME.fullmatch(name) is not None


def _hide_card_numbers(digits: re.Match[str]) -> str:
    return _CARD_NUMBER.sub(_hide_card_number, digits[0])


def _hide_card_number(match: re.Match[str]) -> str:
    digits = [int(digit) for digit in match[0] if digit.isdigit()]
    return HIDDEN if passes_luhn(digits) else match[0]
