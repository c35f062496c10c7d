"""What is written into the append-only history, and what each kind means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    SUBSCRIBED = "subscription.subscribed"
    SUBSCRIPTION_CHANGED = "subscription.changed"
    SUBSCRIPTION_MOVED = "subscription.moved"  # status changed
    SUBSCRIPTION_PAUSED = "subscription.paused"
    SUBSCRIPTION_RESUMED = "subscription.resumed"  # tells which periods were skipped, if any
    SUBSCRIPTION_CANCELLED = "subscription.cancelled"  # it has taken effect
    CANCELLATION_SCHEDULED = "subscription.cancellation_scheduled"  # at the end of the period
    CANCELLATION_WITHDRAWN = "subscription.cancellation_withdrawn"  # before it took effect
    SUBSCRIPTION_ENDED = "subscription.ended"  # no further period; what is open is still owed
    SUBSCRIPTION_HANDED_OVER = "subscription.handed_over"  # another book bills it; debts stay here
    SUBSCRIPTION_TAKEN_BACK = "subscription.taken_back"  # no other book bills it
    BOOK_HANDED_OVER = "book.handed_over"  # nothing new begins here
    BOOK_TAKEN_BACK = "book.taken_back"
    SUBSCRIPTION_STUCK = "subscription.stuck"  # its periods cannot be planned: our bug, or its data
    CATCH_UP_HELD = "subscription.catch_up_held"  # late periods wait for a person
    CATCH_UP_DECIDED = "invoice.catch_up_decided"  # a person said what becomes of a held one
    INVOICE_OPENED = "invoice.opened"  # a period became due
    INVOICE_WAITING = "invoice.waiting"  # open, next step decided or nobody's turn
    INVOICE_GOES_ON = "invoice.goes_on"  # an older one has been unknown for so long: not waited for
    INVOICE_PAID = "invoice.paid"
    INVOICE_VOIDED = "invoice.voided"
    INVOICE_MARKED_PAID = "invoice.marked_paid"  # a named person: paid elsewhere, with evidence
    ATTEMPT_PREPARED = "attempt.prepared"  # written down, not yet at the gateway
    ATTEMPT_CLAIMED = "attempt.claimed"  # taken over from a worker that went away
    ATTEMPT_POSTPONED = "attempt.postponed"  # given back, same attempt later
    ATTEMPT_SUBMITTED = "attempt.submitted"  # committed; the sale follows
    ATTEMPT_SUCCEEDED = "attempt.succeeded"
    ATTEMPT_DECLINED = "attempt.declined"
    ATTEMPT_NOT_CHARGED = "attempt.not_charged"
    ATTEMPT_SURPLUS = "attempt.surplus"  # paid, but not owed: refund
    ATTEMPT_POLLED = "attempt.looked"  # asked the gateway, nothing decided
    ATTEMPT_UNPAID_FINAL = "attempt.unpaid_final"  # the gateway ended it; grace runs
    ATTEMPT_QUARANTINED = "attempt.quarantined"  # the answer does not fit the order
    ATTEMPT_GIVEN_BACK = "attempt.given_back"  # paid, then refunded or charged back
    ATTEMPT_CONTRADICTED = "attempt.contradicted"  # news that a final state does not allow
    ATTEMPT_RESOLVED = "attempt.resolved"  # a named person said whether an unknown one was paid
    ATTEMPT_UNDECIDED = "attempt.undecided"  # for a day: prepared or submitted, said once
    GATEWAY_REFUSES_US = "gateway.refuses_us"  # 401 or 403: credentials or permissions
    POLL_UP_UNRELIABLE = "gateway.look_up_unreliable"  # what it does not list may be there
    ATTEMPT_CALLED_BACK = "attempt.called_back"  # a signed callback: the gateway is asked at once
    CHARGING_STOPPED = "charging.stopped"  # charges fail whatever invoice it is: none is started
    SALES_SWITCHED = "sales.switched"
    BOOK_FORGOT = "book.forgot"  # commits are lost: what is due is looked for at the gateway first
    BOOK_MOVED = "book.moved"  # its database is found at another place, with all it knew
    BOOK_REFUSED = "book.refused"  # nothing is sold from this database as it stands: it says why
    # For the customer or the merchant to be told: written with what they tell about.
    PAYMENT_FAILED = "payment.failed"  # attempt n of m, what follows and when, what is at stake
    PAYMENT_RECOVERED = "payment.recovered"  # paid after at least one decline
    CARD_NEEDED = "card.needed"  # no charge before the customer gives another card
    CUSTOMER_STEP_NEEDED = "customer.step_needed"  # no charge before the customer takes part
    RECOVERY_ENDED = "recovery.ended"  # the ladder or the patience is used up: the policy's end
    SUBSCRIPTION_SUSPENDED = "subscription.suspended"  # by that end; money brings it back
    ATTEMPT_FORBIDDEN = "attempt.forbidden"  # a network rule or a dead card; nothing was sold
    RETRY_ORDERED = "retry.ordered"  # a named person, or a new card, asked for an attempt
    CARD_ADDED = "card.added"  # stored; as default, or as backup with consent
    CARD_UNUSABLE = "card.unusable"  # refused for good: never charged again, for anybody
    CARD_EXPIRING = "card.expiring"  # 60 and 15 days ahead
    SERVICE_PAUSED = "service.paused"  # our configuration is refused: no charges through it
    CARD_PAGE_OPENED = "card_page.opened"  # the customer may enter a card on the gateway's page
    CARD_PAGE_UNPAID = "card_page.unpaid"  # nobody paid there
    CARD_PAGE_POLLED = "card_page.looked"  # asked the gateway, nothing decided
    CARD_STORED = "card.stored"  # paid there, and the card has a token
    CARD_NOT_STORED = "card.not_stored"  # paid there, and no token that may be used: ask again
    SUBSCRIPTION_ARMED = "subscription.armed"  # an imported one may now be billed
    CHARGE_ORDERED = "charge.ordered"  # a one-off charge was asked for


@dataclass(frozen=True, slots=True)
class Event:
    """One line of history. `data` is JSON and holds no secret; `by` is who decided."""

    kind: EventKind
    at: datetime
    by: str
    data: Mapping[str, Any] = field(default_factory=dict)
    alert: bool = False  # a person has to look
