"""Reads Celery messages of other services without trusting their content.

    {"body": base64 of [args, kwargs, embed], "headers": {"task", "id", …}, "properties": {…}}

This is protocol 2. Protocol 1 has task and id in the body (docs/commands.md). Celery's own consumer
cannot read a queue that strangers write to: five of seven malformed messages ended the worker with
its charges, and the other two were lost (`Unrecoverable error`, Celery 5.7.0).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from billing_worker.entrypoints import unique_json
from billing_worker.gateway.redaction import HIDDEN, excerpt, legible
from billing_worker.services.commands.execute import Message
from billing_worker.services.import_records.fields import is_too_deep
from billing_worker.services.import_records.subscription import Fault

LONGEST_MESSAGE = 1_048_576
"""Bytes. Arguments have at most 65,536 characters, and base64 adds a third. A longer message is not
parsed, because parsing takes several times its size.
"""
LONGEST_ENVELOPE = 8 * LONGEST_MESSAGE

LONGEST_NAME = 255
_MAY_HIDE_A_TOKEN = re.compile(r"[\w+/=-]{16,}")


@dataclass(frozen=True, slots=True)
class Envelope:
    message: Message
    wants_answer: bool


class _UnreadableError(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(field, reason)


def read(raw: bytes, now: datetime) -> Envelope:
    """Return a message for any `raw`. An unreadable one names its faults."""
    if len(raw) > LONGEST_MESSAGE:
        return _too_long(raw)
    try:
        outer = _json(raw, "")
        headers = _mapping(outer.get("headers") or {}, "headers")
        body = _json(_body(outer, headers), "body")
        return _envelope(headers, body, now)
    except _UnreadableError as error:
        task, id_ = _names(raw)
        message = Message(task, None, id_, (error.fault,), unreadable=_hidden(raw))
        return Envelope(message, wants_answer=True)


def _too_long(raw: bytes) -> Envelope:
    """Return the message as too long. Its sender gets an answer unless the envelope is too long as
    well.
    """
    fault = Fault("", f"must have at most {LONGEST_MESSAGE} bytes.")
    task, id_ = _names(raw) if len(raw) <= LONGEST_ENVELOPE else ("", None)
    message = Message(task, None, id_, (fault,), unreadable=_hidden(raw[:LONGEST_MESSAGE]))
    return Envelope(message, wants_answer=True)


def _envelope(headers: Mapping[str, Any], body: Any, now: datetime) -> Envelope:
    if "task" in headers:
        if not isinstance(body, list) or len(body) < 2:  # noqa: PLR2004 - args and kwargs
            raise _UnreadableError("body", "must be a list: [args, kwargs, embed].")
        args, kwargs, *embed = body
        options: Mapping[str, Any] = headers
        extras = embed[0] if embed and isinstance(embed[0], Mapping) else {}
    else:
        options = extras = _mapping(body, "body")
        args, kwargs = body.get("args") or [], body.get("kwargs") or {}
    arguments, faults = _record(args, kwargs)
    faults += _asks_too_much(options, extras, now)
    message = Message(
        _name(options.get("task")) or "", arguments, _name(options.get("id")), tuple(faults)
    )
    return Envelope(message, wants_answer=options.get("ignore_result") is not True)


def _record(args: Any, kwargs: Any) -> tuple[Any, list[Fault]]:
    """Return the record of a command: the only argument, or all keyword arguments."""
    if is_too_deep([args, kwargs]):
        return None, [Fault("", "is nested too deeply.")]
    if args == [] and isinstance(kwargs, Mapping):
        return kwargs, []
    if isinstance(args, list) and len(args) == 1 and not kwargs:
        return args[0], []
    return None, [Fault("", "must be one JSON object, alone in args or as kwargs.")]


def _asks_too_much(
    options: Mapping[str, Any], extras: Mapping[str, Any], now: datetime
) -> list[Fault]:
    """Return the faults of a message that asks for Celery features which commands do not have."""
    faults = []
    if options.get("eta") is not None:
        faults.append(Fault("eta", "must be empty: a command is carried out when it arrives."))
    if options.get("expires") is not None and _has_passed(options["expires"], now):
        faults.append(Fault("expires", "has passed, or is not an ISO 8601 time."))
    followed_by = [name for name in ("callbacks", "errbacks", "chain", "chord") if extras.get(name)]
    faults += [Fault(name, "must be empty: a command calls nobody.") for name in followed_by]
    return faults


def _has_passed(expires: Any, now: datetime) -> bool:
    try:
        moment = datetime.fromisoformat(expires)
    except (TypeError, ValueError):
        return True
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) <= now


# --- bytes ---------------------------------------------------------------------------------------


def _json(text: bytes | str, field: str) -> Any:
    try:
        value = unique_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError(field, _why_not_json(error)) from None
    return value if field else _mapping(value, field)


def _why_not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, unique_json.KeyTwice):
        return f"is refused: {error}."
    return f"is not JSON ({type(error).__name__})."


def _mapping(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _UnreadableError(field, "must be a JSON object.")
    return value


def _body(outer: Mapping[str, Any], headers: Mapping[str, Any]) -> bytes | str:
    body = outer.get("body")
    properties = _mapping(outer.get("properties") or {}, "properties")
    if outer.get("content-type", "application/json") != "application/json":
        raise _UnreadableError("content-type", "must be application/json.")
    if headers.get("compression"):
        raise _UnreadableError("compression", "must be empty.")
    if not isinstance(body, str):
        raise _UnreadableError("body", "must be text.")
    if properties.get("body_encoding") != "base64":
        return body
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        raise _UnreadableError("body", "is not base64.") from None


def _names(raw: bytes) -> tuple[str, str | None]:
    """Return task and id from the headers of a message with an unreadable body."""
    try:
        headers = json.loads(raw)["headers"]
        return _name(headers.get("task")) or "", _name(headers.get("id"))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return "", None


def _name(value: Any) -> str | None:
    return legible(value)[:LONGEST_NAME] if isinstance(value, str) else None


def _hidden(raw: bytes) -> str:
    """Return the beginning of an unreadable message, without anything long enough to be a token."""
    return _MAY_HIDE_A_TOKEN.sub(HIDDEN, excerpt(raw))
