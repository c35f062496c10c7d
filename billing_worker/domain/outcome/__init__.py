"""Turns news about an attempt into new states of attempt, invoice and subscription.

All news (answer to a sale, poll, callback, operator) passes through `conclude`, which is pure. Late
or repeated news never moves a state back. News that contradicts the state is recorded and alerts a
person.

    attempt_result   the kinds of news, what they are about, and the conclusion
    conclude         chooses the rules for a piece of news
    paid             the gateway states that money was paid
    unpaid           a charge ended unpaid, or is undecided
    pay_link_unpaid  a pay page ended unpaid
    recheck          news about an attempt that has ended
    resolved         a named person decides an attempt that the gateway leaves undecided
    distance         how long an ended attempt may still be paid, and what waits for that
    next_step        what happens to an unpaid invoice and its subscription
    attempt_changes  changes of the attempt itself, and the date of its next poll
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
from billing_worker.domain.outcome.pay_link_unpaid import LINK_NEVER_HANDED_OUT
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
    "LINK_NEVER_HANDED_OUT",
    "LONGEST_EAGER_WAIT",
    "MADE_BY_SOMEBODY",
    "NEEDS_CUSTOMER",
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
