"""Commands that another book has carried out: sent again, they answer `unchanged` here too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from marshmallow import fields, validate
from sqlalchemy import Row

from billing_worker.persistence import commands
from billing_worker.persistence.store import Store
from billing_worker.services.commands.records import (
    SHOWN_REFERENCE,
    START_CHECKOUT,
    START_TOKENISATION,
    TASKS,
)
from billing_worker.services.import_records.fields import Aware, StrictSchema, can_be_stored
from billing_worker.services.import_records.subscription import loaded

NAME = "done_command"
"""The only field of a line that holds such a command, beside the lines of subscriptions."""

COMMAND_BATCH = 1_000

_MOVED = sorted(set(TASKS) - {START_CHECKOUT, START_TOKENISATION})
"""Without commands that open a page: the page is requested again here."""


class _DoneSchema(StrictSchema):
    task = fields.String(required=True, validate=validate.OneOf(_MOVED))
    reference_id = fields.String(
        required=True, validate=[validate.Length(min=1, max=SHOWN_REFERENCE), can_be_stored]
    )
    digest = fields.String(required=True, validate=validate.Regexp("^[0-9a-f]{64}$"))
    received_at = Aware(required=True)
    arguments = fields.Raw(required=True, validate=can_be_stored)
    answer = fields.Dict(keys=fields.String(), required=True, validate=can_be_stored)


_DONE = _DoneSchema()


def done_lines(store: Store) -> Iterator[dict[str, Any]]:
    """Yield every command that this book has carried out, as an import reads it."""
    last_id = 0
    while True:
        with store.reading() as connection:
            page = commands.done_page(connection, last_id, COMMAND_BATCH)
        yield from ({NAME: _told(row)} for row in page if row.task in _MOVED)
        if len(page) < COMMAND_BATCH:
            return
        last_id = page[-1].id


def _told(row: Row[Any]) -> dict[str, Any]:
    return {
        "task": row.task,
        "reference_id": row.reference_id,
        "digest": row.digest,
        "received_at": row.received_at.isoformat(),
        "arguments": row.arguments,
        "answer": row.answer,
    }


def is_done_command(raw: Any) -> bool:
    return isinstance(raw, Mapping) and set(raw) == {NAME}


def parse_done(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read one such line. Raises BadRecord."""
    return loaded(_DONE, raw[NAME])


def remember(store: Store, done: Sequence[dict[str, Any]]) -> int:
    """Record them. Returns how many are new here."""
    with store.transaction() as connection:
        return commands.remember(connection, done)
