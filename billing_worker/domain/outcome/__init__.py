"""The one place where news about an attempt becomes a new state of attempt, invoice, subscription.

Response, poll, callback, operator: all news passes through `conclude`, which is pure. Late and
repeated news never moves a state back; what does not fit is written down and shown to a person.

    news      what may be heard, what it is about, what is concluded
    dispatch  which rules apply to which news
    paid      money came
    unpaid    a charge ended without money, or is not decided
    link      a pay page ended without money
    late      news about an attempt that had ended
    resolved  a named person's word on an attempt that the gateway leaves undecided
    distance  how long its money may still come, and what waits for it
    recovery  what becomes of the debt, and of its subscription
    moves     the attempt itself, and when the gateway is asked about it next
"""

from billing_worker.domain.outcome.attempt_changes import (
    EAGER_POLLS_FOR,
    LONGEST_EAGER_WAIT,
    NEEDS_CUSTOMER,
    PATIENT_WAIT,
    RECHECKS,
    withdrawn,
)
from billing_worker.domain.outcome.attempt_result import (
    Case,
    Conclusion,
    Context,
    Forbidden,
    NeverHandedOut,
    News,
    NoAnswer,
    NothingSent,
    Postponed,
    Resolved,
    Stated,
)
from billing_worker.domain.outcome.conclude import conclude
from billing_worker.domain.outcome.distance import ended_unproven, not_before, was_never_sold
from billing_worker.domain.outcome.next_step import give_up, owes_no_longer
from billing_worker.domain.outcome.paid import current_again
from billing_worker.domain.outcome.pay_link_unpaid import NEVER_HANDED_OUT
from billing_worker.domain.outcome.resolved import (
    PAID_BY_WORD,
    is_overruled,
    is_resolved,
    is_unknown,
    may_be_resolved,
)
from billing_worker.domain.outcome.unpaid import MADE_BY_SOMEBODY

__all__ = [
    "EAGER_POLLS_FOR",
    "LONGEST_EAGER_WAIT",
    "MADE_BY_SOMEBODY",
    "NEEDS_CUSTOMER",
    "NEVER_HANDED_OUT",
    "PAID_BY_WORD",
    "PATIENT_WAIT",
    "RECHECKS",
    "Case",
    "Conclusion",
    "Context",
    "Forbidden",
    "NeverHandedOut",
    "News",
    "NoAnswer",
    "NothingSent",
    "Postponed",
    "Resolved",
    "Stated",
    "conclude",
    "current_again",
    "ended_unproven",
    "give_up",
    "is_overruled",
    "is_resolved",
    "is_unknown",
    "may_be_resolved",
    "not_before",
    "owes_no_longer",
    "was_never_sold",
    "withdrawn",
]
