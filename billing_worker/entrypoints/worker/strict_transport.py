"""The Redis transport of the worker, which hands nothing to Celery but our own tasks in our own form.

Whoever may write to Redis may write anything to a queue. Celery's consumer trusts it: bytes that are
no JSON, a list in place of an object or a bad time limit end the worker; a compressed body is
unpacked whatever its size; built-in tasks run. Here each message is read without trust and written
anew: task, id, expiry and arguments. Anything else is dropped with one log line.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from queue import Empty
from typing import Any, Final

import structlog
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel, QoS, Transport

from billing_worker.services.commands.records import TASKS as COMMAND_TASKS

LONGEST_BODY: Final = 1_048_576
"""Characters of base64. Our own messages hold some hundred ids."""

LONGEST_ID: Final = 255
LARGEST_ID: Final = 2**63 - 1

OURS: Final = "billing."

_TRACE_PARENT: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header"""

_EXPIRES_IN_YEARS: Final = range(1971, 9000)

_NOT_OURS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)

log = structlog.get_logger()


class _RefusedError(ValueError):
    """`args[0]` says why, and repeats nothing of the message."""


class _StrictQoS(QoS):  # its stubs lack what begins with _
    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's form
        """A message that another worker did not finish. What is no message is forgotten."""
        try:
            super().restore_by_tag(tag, client, leftmost)
        except _NOT_OURS as error:
            _refused("unacked", type(error).__name__)
            self._remove_from_indices(tag).execute()  # type: ignore[attr-defined]


class _StrictChannel(Channel):
    QoS = _StrictQoS

    # Messages in progress are not returned when Redis is lost: the sweeps send them again. kombu
    # 5.7 uses the connection that it has just closed, and the AttributeError ends the worker (seen
    # in a storm test).
    do_restore = False

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (ValueError, RecursionError) as error:  # no JSON
            _refused("any", type(error).__name__)
            raise Empty from None


class StrictTransport(Transport):
    Channel = _StrictChannel

    def _deliver(self, message: Any, queue: str | None) -> None:
        try:
            ours = _read(message, str(queue))
        except _NOT_OURS as error:
            reason = str(error) if isinstance(error, _RefusedError) else type(error).__name__
            _refused(str(queue), reason)
            return
        super()._deliver(ours, queue)


def use_strict_transport() -> None:
    """Make it the Redis transport of this process."""
    name = f"{StrictTransport.__module__}:{StrictTransport.__qualname__}"
    TRANSPORT_ALIASES.update(redis=name, rediss=name)


def _refused(queue: str, reason: str) -> None:
    log.warning("queue.message_refused", queue=queue, reason=reason)


def _read(message: Any, queue: str) -> dict[str, Any]:
    """Return a new message with the same meaning. Raises one of _NOT_OURS."""
    headers, body = message["headers"], message["body"]
    task = headers["task"]
    if not isinstance(task, str) or not task.startswith(OURS):
        raise _RefusedError("no task of ours")
    if headers.get("compression") or message.get("content-type") != "application/json":
        raise _RefusedError("no plain JSON")
    if headers.get("eta"):
        raise _RefusedError("asks for a later time")
    if not isinstance(body, str) or len(body) > LONGEST_BODY:
        raise _RefusedError("body too long, or no text")
    if message["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body, validate=True)
    args, kwargs, *_ = json.loads(body)
    if not isinstance(args, list) or not isinstance(kwargs, Mapping):
        raise _RefusedError("no arguments")
    # Commands that came through another queue are passed on, and read there.
    if task not in COMMAND_TASKS and not _are_ids(args, kwargs):
        raise _RefusedError("arguments are no ids")
    return _written_anew(headers, task, args, kwargs, queue)


def _are_ids(args: list[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether they are one list of row ids, or nothing at all."""
    if kwargs or not all(isinstance(one, list) for one in args[:1]) or args[1:]:
        return False
    return all(type(one) is int and 0 < one <= LARGEST_ID for one in (args or [[]])[0])


def _expiry(text: Any) -> str | None:
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    if moment.year not in _EXPIRES_IN_YEARS:  # others overflow in another time zone
        raise _RefusedError("expires at no usable time")
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat()


def _trace(parent: Any) -> dict[str, str]:
    """Return the header by which OpenTelemetry joins the trace of the sender, if it is one."""
    is_one = isinstance(parent, str) and _TRACE_PARENT.fullmatch(parent)
    return {"traceparent": parent} if is_one else {}


def _written_anew(
    headers: Mapping[str, Any], task: str, args: list[Any], kwargs: Mapping[str, Any], queue: str
) -> dict[str, Any]:
    named = headers.get("id")
    task_id = named if isinstance(named, str) and len(named) <= LONGEST_ID else str(uuid.uuid4())
    body = json.dumps([args, kwargs, {}]).encode()
    wants = headers.get("ignore_result")
    return {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": task,
            "id": task_id,
            "root_id": task_id,
            "parent_id": None,
            "group": None,
            "eta": None,
            "expires": _expiry(headers.get("expires")),
            "retries": 0,
            "timelimit": [None, None],
            "ignore_result": wants if isinstance(wants, bool) else None,
            **_trace(headers.get("traceparent")),
        },
        "properties": {
            "correlation_id": task_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
