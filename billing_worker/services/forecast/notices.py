"""What notices do to coming charges: some wait for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain.outgoing.notice import NoticePolicy, earliest, needed
from billing_worker.persistence.outbox import notices
from billing_worker.persistence.outbox.notices import agreement_from
from billing_worker.services.forecast.line import Expected

NO_NOTICE_YET = "waits for a notice: its customer was not told early enough"


class Notices:
    """The notices of a batch of subscriptions, read once, and only of those that require some."""

    def __init__(
        self, connection: Connection, rows: Sequence[Row[Any]], default: NoticePolicy, now: datetime
    ) -> None:
        self._default, self._now = default, now
        # Any period but the first stands for all of them.
        asked = [row.id for row in rows if self._requires(row, 1) or self._requires(row, 0)]
        self._known = notices.of_subscriptions(connection, asked) if asked else {}

    def _requires(self, row: Row[Any], number: int) -> bool:
        need = needed(agreement_from(row), number, self._default)
        return need is not None and need.is_required

    def after(self, row: Row[Any], line: Expected) -> Expected:
        """Return the line of a charge with the date that its notice allows, or with why it waits."""
        need = needed(agreement_from(row), line.period, self._default)
        if need is None or not need.is_required or line.money is None:
            return line
        known = self._known.get((row.id, line.period))
        notice = known if known and known.is_of(line.start, line.money) else None
        at, charged_from = line.at or self._now, earliest(need, notice, self._now)
        if charged_from <= at:
            return line
        if notice is None or notice.accepted_at is None:
            return replace(line, reason=NO_NOTICE_YET)
        return replace(line, at=charged_from)
