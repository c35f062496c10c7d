"""The merchant's choice about periods that were not billed in time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from billing_worker.domain.errors import InvalidInput

MAX_DAYS = 365


class CatchUp(StrEnum):
    COLLECT_LATEST = "collect_latest"  # The latest period is collected, earlier ones are waived.
    COLLECT_ALL = "collect_all"  # All are collected, at least `days` apart.
    FORGIVE_OLDER_THAN = "forgive_older_than"  # Periods older than `days` are waived.
    HOLD = "hold"  # Late periods wait for a person's decision.


WITH_DAYS = frozenset({CatchUp.COLLECT_ALL, CatchUp.FORGIVE_OLDER_THAN})


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule, with `days` (1 to MAX_DAYS) if it is one of WITH_DAYS; else `days` is None.

    Raises InvalidInput on `catch_up` for anything else.
    """

    rule: CatchUp
    days: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in WITH_DAYS:
            if self.days is not None:
                raise InvalidInput("catch_up", f"{self.rule} takes no days")
        elif type(self.days) is not int or not 1 <= self.days <= MAX_DAYS:
            raise InvalidInput("catch_up", f"{self.rule} needs days, from 1 to {MAX_DAYS}")

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read "hold", "collect_latest", "collect_all:3" or "forgive_older_than:7"."""
        name, colon, days = text.partition(":")
        if name not in set(CatchUp):
            raise InvalidInput("catch_up", f"must be one of {', '.join(CatchUp)}")
        if colon and not (days.isascii() and days.isdigit() and len(days) <= len(str(MAX_DAYS))):
            raise InvalidInput("catch_up", "days must be a whole number, as in collect_all:3")
        return cls(CatchUp(name), int(days) if colon else None)

    def __str__(self) -> str:
        return str(self.rule) if self.days is None else f"{self.rule}:{self.days}"


DEFAULT_POLICY = Policy(CatchUp.COLLECT_LATEST)
"""One debit, for the current period: what the customer expects to pay today, and no more.

Collecting all missed periods at once had to be reverted elsewhere
(https://github.com/getlago/lago-api/pull/5935). `HOLD` would stop all billing after each outage. An
outage shorter than the interval waives nothing.
"""

INSTALMENTS_POLICY = Policy(CatchUp.COLLECT_ALL, 7)
"""Of an agreement with a number of periods, unless it names another: every instalment is owed, and
none is waived because nobody billed it in time. A week apart.
"""


def default_policy(ends_after_periods: int | None) -> Policy:
    """Return the policy of an agreement that names none."""
    return DEFAULT_POLICY if ends_after_periods is None else INSTALMENTS_POLICY
