"""The events of the append-only history, and what each kind means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    SUBSCRIBED = "subscription.subscribed"
    SUBSCRIPTION_CHANGED = "subscription.changed"
    SUBSCRIPTION_REPRICED = "subscription.repriced"  # an amount agreed for later counts from now on
    SUBSCRIPTION_MOVED = "subscription.moved"  # status changed
    SUBSCRIPTION_PAUSED = "subscription.paused"
    SUBSCRIPTION_RESUMED = "subscription.resumed"  # its data names the skipped periods
    SUBSCRIPTION_CANCELLED = "subscription.cancelled"  # it has taken effect
    CANCELLATION_SCHEDULED = "subscription.cancellation_scheduled"  # at the end of the period
    CANCELLATION_WITHDRAWN = "subscription.cancellation_withdrawn"  # before it took effect
    SUBSCRIPTION_FORGIVEN = "subscription.forgiven"  # suspended, its debts are void: billed again
    SUBSCRIPTION_ENDED = "subscription.ended"  # no further period; open invoices are still owed
    SUBSCRIPTION_HANDED_OVER = "subscription.handed_over"  # another book bills it from now on
    SUBSCRIPTION_TAKEN_BACK = "subscription.taken_back"  # this book bills it again
    BOOK_HANDED_OVER = "book.handed_over"  # no subscription or one-off charge begins here any more
    BOOK_TAKEN_BACK = "book.taken_back"
    SUBSCRIPTION_STUCK = "subscription.stuck"  # its periods cannot be computed: a bug, or bad data
    CATCH_UP_HELD = "subscription.catch_up_held"  # late periods wait for a person
    CATCH_UP_DECIDED = "invoice.catch_up_decided"  # a person decided about a held period
    INVOICE_OPENED = "invoice.opened"  # a period became due
    INVOICE_WAITING = "invoice.waiting"  # open; its next step is decided, or a person has to act
    INVOICE_GOES_ON = "invoice.goes_on"  # no longer waits for an older invoice that stays unknown
    INVOICE_PAID = "invoice.paid"
    INVOICE_VOIDED = "invoice.voided"
    INVOICE_MARKED_PAID = "invoice.marked_paid"  # by a named person: paid elsewhere, with evidence
    ATTEMPT_PREPARED = "attempt.prepared"  # recorded, not yet at the gateway
    ATTEMPT_CLAIMED = "attempt.claimed"  # taken over from a worker whose lease ran out
    ATTEMPT_POSTPONED = "attempt.postponed"  # the same attempt continues later
    ATTEMPT_SUBMITTED = "attempt.submitted"  # committed; the sale follows
    ATTEMPT_SUCCEEDED = "attempt.succeeded"
    ATTEMPT_DECLINED = "attempt.declined"
    ATTEMPT_NOT_CHARGED = "attempt.not_charged"
    ATTEMPT_SURPLUS = "attempt.surplus"  # paid, but not owed: refund
    ATTEMPT_POLLED = "attempt.looked"  # the gateway was asked; nothing is decided
    ATTEMPT_UNPAID_FINAL = "attempt.unpaid_final"  # final and unpaid at the gateway; the grace runs
    ATTEMPT_QUARANTINED = "attempt.quarantined"  # the gateway's statement does not match the order
    ATTEMPT_GIVEN_BACK = "attempt.given_back"  # paid, then refunded or charged back
    ATTEMPT_CONTRADICTED = "attempt.contradicted"  # a statement that contradicts a final state
    ATTEMPT_RESOLVED = "attempt.resolved"  # by a named person: an unknown one was paid, or was not
    ATTEMPT_UNDECIDED = "attempt.undecided"  # prepared or submitted for a day; written once
    ATTEMPT_SUSPECTED = "attempt.suspected"  # a time that was lost may have made it: looked for
    ATTEMPT_LEFT_TO_PERSON = (
        "attempt.left_to_person"  # may be sold, pending for 30 days: polled no more
    )
    GATEWAY_REFUSES_US = "gateway.refuses_us"  # 401 or 403: credentials or permissions
    SALES_REFUSED = "gateway.refuses_sales"  # 401, 403, 404 or 405 to a sale: address or rights
    LOOK_UP_UNRELIABLE = "gateway.look_up_unreliable"  # its list ignored our filter
    ATTEMPT_CALLED_BACK = "attempt.called_back"  # a signed callback: the gateway is asked at once
    CHARGING_STOPPED = "charging.stopped"  # charges of all invoices fail: no more are started
    VAULT_ROTATED = "vault.rotated"  # every stored secret is encrypted with the newest key
    TOKENS_EXPORTED = "tokens.exported"  # card tokens are about to leave in clear
    SALES_SWITCHED = "sales.switched"
    WORK_RESUMED = "work.resumed"  # a sweep has finished after none had for too long
    INVARIANT_BROKEN = "invariant.broken"  # the books contradict themselves; the data says where
    BOOK_FORGOT = "book.forgot"  # commits are lost: due charges are looked up at the gateway first
    BOOK_MOVED = "book.moved"  # its database has another address and is complete
    BOOK_REFUSED = "book.refused"  # no sale is made from this database; the data says why
    # Notices to the customer or merchant, committed together with the change they report.
    PAYMENT_FAILED = "payment.failed"  # attempt n of m, what follows and when, what is at stake
    PAYMENT_RECOVERED = "payment.recovered"  # paid after at least one decline
    CARD_NEEDED = "card.needed"  # no charge before the customer gives another card
    CUSTOMER_STEP_NEEDED = "customer.step_needed"  # no charge before the customer takes part
    RECOVERY_ENDED = "recovery.ended"  # retries or waiting time are used up: the policy's end
    SUBSCRIPTION_SUSPENDED = "subscription.suspended"  # by that end; a payment reactivates it
    ATTEMPT_FORBIDDEN = "attempt.forbidden"  # a network rule or a dead card; nothing was sold
    RETRY_ORDERED = "retry.ordered"  # a named person, or a new card, asked for an attempt
    CUSTOMER_CHANGED = "customer.changed"  # another name or e-mail; which, not what
    CARD_REMOVED = "card.removed"  # its token is forgotten
    CARD_ADDED = "card.added"  # stored; as default, or as backup with consent
    CARD_UNUSABLE = "card.unusable"  # refused for good: never charged again
    CARD_EXPIRING = "card.expiring"  # 60 and 15 days ahead
    RENEWAL_UPCOMING = "renewal.upcoming"  # the customer is told of the next charge
    TRIAL_ENDING = "trial.ending"  # and of the first one after a trial
    NOTICE_ACCEPTED = "notice.accepted"  # by a receiver, or another service has sent it
    SERVICE_PAUSED = "service.paused"  # our configuration is refused: no charges through it
    CARD_PAGE_OPENED = "card_page.opened"  # the customer may enter a card on the gateway's page
    CARD_PAGE_UNPAID = "card_page.unpaid"  # ended without a payment
    CARD_PAGE_POLLED = "card_page.looked"  # the gateway was asked; nothing is decided
    CARD_STORED = "card.stored"  # paid on the page, and the card has a token
    CARD_NOT_STORED = "card.not_stored"  # paid on the page, but there is no usable token
    SUBSCRIPTION_ARMED = "subscription.armed"  # an imported one may now be billed
    CHARGE_ORDERED = "charge.ordered"  # a one-off charge was asked for


@dataclass(frozen=True, slots=True)
class Event:
    """One line of history. `data` is JSON and holds no secret; `by` is who decided.

    A date that is given as a value of `data` becomes ISO 8601 text.
    """

    kind: EventKind
    at: datetime
    by: str
    data: Mapping[str, Any] = field(default_factory=dict)
    alert: bool = False  # True: a person has to act

    def __post_init__(self) -> None:
        data = {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in self.data.items()
        }
        object.__setattr__(self, "data", data)  # the way around `frozen`
