"""What must hold in the books at any time, whoever writes them: one sentence and one question each.

The questions read tables only. They share no query and no decision with the code that writes, so
that a fault there does not hide itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from billing_worker.persistence.invariants import agreements, cards, money, work
from billing_worker.persistence.invariants.asking import Question

_EXPLAIN: Final = "billing-worker explain {reference}"
_SHOW: Final = "billing-worker subscriptions show {reference}"


@dataclass(frozen=True, slots=True)
class Invariant:
    name: str
    says: str
    """What always holds, in one sentence."""
    question: Question
    look: str = _EXPLAIN
    """The command that shows what breaks it."""
    every: timedelta = timedelta(minutes=1)
    done_by: str | None = None
    """The sweep that does this work in time. It may be late as long as it may be silent, twice."""


INVARIANTS: Final = (
    Invariant(
        "due_period_is_opened",
        "A period that is due has its invoice.",
        work.DUE_PERIODS,
        look=_SHOW,
        done_by="billing.renew",
    ),
    Invariant(
        "due_invoice_wakes_a_worker",
        "A worker is woken for every invoice whose step is due.",
        work.DUE_INVOICES,
        done_by="billing.ring",
    ),
    Invariant(
        "due_poll_wakes_a_worker",
        "A worker is woken for every attempt that is to be asked about.",
        work.DUE_POLLS,
        done_by="billing.reconcile",
    ),
    Invariant(
        "event_gets_its_number",
        "An event for other systems is numbered soon.",
        work.UNTOLD,
        look="billing-worker events list",
        done_by="billing.publish",
    ),
    Invariant(
        "submitted_is_polled",
        "A submitted attempt has a date on which the gateway is asked.",
        work.NEVER_POLLED,
    ),
    Invariant(
        "prepared_goes_on",
        "A prepared attempt is taken up again, or its invoice says for whom it waits.",
        work.NEVER_CONTINUED,
    ),
    Invariant(
        "one_live_attempt",
        "An invoice has at most one attempt that may still move money.",
        work.SEVERAL_LIVE,
    ),
    Invariant(
        "open_invoice_goes_on",
        "An open invoice has a next step, a live attempt, or a reason why neither.",
        work.OPEN_WITHOUT_STEP,
    ),
    Invariant(
        "billed_subscription_has_a_date",
        "A subscription that is billed has the date of its next period.",
        work.ARMED_WITHOUT_DATE,
        look=_SHOW,
    ),
    Invariant(
        "paid_once_and_in_full",
        "A paid invoice has exactly one payment, of its amount and currency, or a person's word.",
        money.PAID_BY_NOTHING,
    ),
    Invariant(
        "payment_pays",
        "The invoice of a succeeded attempt is paid.",
        money.PAYS_NOTHING,
    ),
    Invariant(
        "payment_has_evidence",
        "A succeeded attempt has the gateway's statement, or a person's, in its history.",
        money.SUCCESS_WITHOUT_EVIDENCE,
    ),
    Invariant(
        "submitted_once",
        "An attempt is submitted at most once.",
        money.SUBMITTED_TWICE,
    ),
    Invariant(
        "surplus_is_told",
        "Money that is not owed was told of, so that a person gives it back.",
        money.SURPLUS_UNTOLD,
    ),
    Invariant(
        "one_mode",
        "Everything that was submitted from a book is of its mode: test or live.",
        money.MODE_OF_ANOTHER,
    ),
    Invariant(
        "cancelled_is_not_charged",
        "Nothing is charged by itself after a subscription was cancelled.",
        agreements.CHARGED_AFTER_CANCELLATION,
        look=_SHOW,
    ),
    Invariant(
        "paused_is_not_charged",
        "Nothing is charged while a subscription is paused.",
        agreements.CHARGED_IN_PAUSE,
        look=_SHOW,
    ),
    Invariant(
        "periods_follow_one_another",
        "A period begins where the one before ended, unless a decision lies between them.",
        agreements.PERIOD_LOST,
    ),
    Invariant(
        "who_gave_it_up_is_told",
        "The history of a void or uncollectible invoice says who gave it up.",
        agreements.GIVEN_UP_BY_NOBODY,
    ),
    Invariant(
        "who_stopped_it_is_told",
        "The history of a paused, cancelled or suspended subscription says who stopped it.",
        agreements.STOPPED_BY_NOBODY,
        look=_SHOW,
    ),
    Invariant(
        "card_of_the_customer_is_charged",
        "An attempt charges a card of the customer who owes.",
        cards.CHARGED_CARD_OF_ANOTHER,
    ),
    Invariant(
        "card_of_the_customer_is_chosen",
        "A subscription is paid with a card of its own customer.",
        cards.PAYS_WITH_CARD_OF_ANOTHER,
        look=_SHOW,
    ),
    Invariant(
        "refused_card_is_dead",
        "A card that was refused for good, not for its age, is dead, and so is every equal one.",
        cards.REFUSED_CARD_USABLE,
    ),
    Invariant(
        "network_limits_hold",
        "No card is tried more often than its network allows.",
        cards.BEYOND_NETWORK_LIMIT,
        look="billing-worker cards list {reference}",
    ),
)
