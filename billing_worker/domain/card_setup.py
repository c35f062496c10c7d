"""A card setup: the customer pays once on the gateway's page, and the card gets a token.

    prepared ──▶ open ──▶ stored      paid, and the card has a token
        │          ├────▶ no_card     paid, and there is no token that may be used
        └──────────┴────▶ unpaid      not paid; a late payment still stores the card

If a setup also pays an invoice, an attempt of that invoice records the payment; this module decides
only about the card. It is pure and compares every statement of the gateway with what was ordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import (
    EAGER_POLLS_FOR,
    LONGEST_EAGER_WAIT,
    PATIENT_WAIT,
    RECHECKS,
    Context,
)
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import (
    Expected,
    Finding,
    Owner,
    Statement,
    Verdict,
    foreign,
    judge,
    page_may_be_paid,
)

# --- what the gateway says --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page:
    """Where the customer's browser goes: submit `params` to `action` with `method`."""

    action: str = field(repr=False)  # secret: anybody who has this URL may pay
    method: str  # GET or POST
    params: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoredCard:
    """The card of a payment: its data for display, and the token to charge it again, if any."""

    token: Secret | None = field(default=None, repr=False)
    mask: str | None = None
    first: str | None = None
    last: str | None = None
    holder: str | None = None
    expiry_month: int | None = None
    expiry_year: int | None = None
    brand: str | None = None
    issuer_name: str | None = None
    issuer_country: str | None = None


@dataclass(frozen=True, slots=True)
class HostedStatement:
    """The gateway's statement about an invoice that is paid on a page. None: not stated."""

    statement: Statement
    page: Page | None = None
    card: StoredCard | None = None
    alone: bool = True  # no other one of ours was found under its reference
    made_by_somebody: bool = False
    """This book did not create the invoice, so somebody else may have its page."""


# --- what we keep -----------------------------------------------------------------------------


class HostedStatus(StrEnum):
    PREPARED = "prepared"  # Recorded; nobody has the page.
    OPEN = "open"  # It may be paid. Only a statement of the gateway ends this.
    STORED = "stored"
    NO_CARD = "no_card"
    UNPAID = "unpaid"


TRANSITIONS: Mapping[HostedStatus, frozenset[HostedStatus]] = {
    HostedStatus.PREPARED: frozenset({HostedStatus.OPEN, HostedStatus.UNPAID}),
    HostedStatus.OPEN: frozenset({HostedStatus.STORED, HostedStatus.NO_CARD, HostedStatus.UNPAID}),
    # A final status of the gateway may change (gateway.md §0 H), and a token may come late.
    HostedStatus.UNPAID: frozenset({HostedStatus.STORED, HostedStatus.NO_CARD}),
    HostedStatus.NO_CARD: frozenset({HostedStatus.STORED}),
    HostedStatus.STORED: frozenset(),
}

PAID_SETUPS = frozenset({HostedStatus.STORED, HostedStatus.NO_CARD})


def move(current: HostedStatus, to: HostedStatus) -> HostedStatus:
    """Return `to`. Raises IllegalTransition when TRANSITIONS does not allow the change."""
    if to not in TRANSITIONS[current]:
        raise IllegalTransition(f"hosted payment: {current} -> {to}")
    return to


@dataclass(frozen=True, slots=True)
class HostedPayment:
    id: int
    reference_id: str  # the caller's
    gateway_reference: str  # our reference at the gateway
    customer_id: int
    customer_reference: str
    attempt_id: int | None  # holds the slot of the invoice that it pays, if any
    money: Money
    test_mode: bool
    status: HostedStatus
    fence: int  # grows with every take-over; only the newest caller may hand out the page
    created_at: datetime
    gateway_id: str | None
    opened_at: datetime | None
    settled_at: datetime | None
    next_poll_at: datetime | None  # when the gateway is asked next; None: never again
    unpaid_since: datetime | None  # when the gateway first called it final and unpaid
    outcome: str | None  # why it ended
    book: str | None = None  # the identity of our book

    @property
    def expected(self) -> Expected:
        """What a statement is compared with. The customer is left out: another customer's payment
        counts too, but their card is not stored.
        """
        return Expected(
            self.gateway_reference, self.money, test_mode=self.test_mode, owner=Owner(self.book)
        )

    @property
    def whose(self) -> Expected:
        """`expected` with the customer: an invoice found by reference may be another customer's."""
        return replace(self.expected, owner=Owner(self.book, self.customer_reference))


TOKEN_MISSING = "token_missing"  # noqa: S105 - the name of a reason
FOREIGN_TOKEN = "token_of_another_customer"  # noqa: S105
SETUP_NEVER_HANDED_OUT = "never_handed_out"

STEPS: Mapping[str, str] = {
    TOKEN_MISSING: "the customer enters the card once more, on a new page",
    FOREIGN_TOKEN: "a person checks: the gateway links this card to another customer",
}
"""What has to happen next, by outcome. No payment is repeated automatically."""


@dataclass(frozen=True, slots=True)
class Concluded:
    payment: HostedPayment
    events: tuple[Event, ...] = ()
    keep: StoredCard | None = None  # a card to store; it has a token


# --- news -------------------------------------------------------------------------------------


def conclude(
    payment: HostedPayment,
    said: HostedStatement | None,
    context: Context,
    *,
    token_is_foreign: bool = False,
    not_handed_out: str = SETUP_NEVER_HANDED_OUT,
) -> Concluded:
    """Apply a statement of the gateway.

    `said` None: no answer, which proves nothing. For a prepared payment None means that the gateway
    knows no such invoice.
    `token_is_foreign`: the stated token is already stored for another customer.
    `not_handed_out`: why nobody was given the page of a prepared payment.
    """
    if said is not None and payment.gateway_id is None and _is_foreign(payment, said):
        said = None
    payment = _with_gateway_id(payment, said)
    if payment.status is HostedStatus.PREPARED:
        if said is None or payment.gateway_id is None or not page_may_be_paid(said.statement):
            return given_up(payment, not_handed_out, context)
        touched = move(payment.status, HostedStatus.OPEN)
        payment = replace(payment, status=touched, opened_at=context.now)
    if said is None:
        return Concluded(_ask_again(payment, context))
    finding = judge(said.statement, payment.expected)
    match finding.verdict:
        case Verdict.PAID:
            return _paid(payment, said, context, token_is_foreign=token_is_foreign)
        case Verdict.DECLINED | Verdict.UNPAID_FINAL:
            return _unpaid(payment, finding, context)
        case Verdict.CONTRADICTORY | Verdict.PENDING:
            return _undecided(payment, finding, context)


def _is_foreign(payment: HostedPayment, said: HostedStatement) -> bool:
    """Whether an invoice found by our reference belongs to another book or customer."""
    return foreign(said.statement, payment.whose) is not None


def _with_gateway_id(payment: HostedPayment, said: HostedStatement | None) -> HostedPayment:
    if said is None or payment.gateway_id is not None:
        return payment
    # The answer to our own create may leave the reference out.
    if said.statement.reference_id not in {None, payment.gateway_reference}:
        return payment
    return replace(payment, gateway_id=said.statement.gateway_id)


def given_up(payment: HostedPayment, reason: str, context: Context) -> Concluded:
    """End a prepared payment whose page nobody was given.

    The gateway is polled again later: it may charge a known card when it creates the page.
    """
    return _ended(payment, HostedStatus.UNPAID, reason, context.now + RECHECKS[0], context)


def _paid(
    payment: HostedPayment, said: HostedStatement, context: Context, *, token_is_foreign: bool
) -> Concluded:
    if payment.status is HostedStatus.STORED:
        return Concluded(replace(payment, next_poll_at=None))
    foreign = token_is_foreign or said.statement.owner.customer not in {
        None,
        payment.customer_reference,
    }
    if said.card is None or said.card.token is None:
        # The gateway may create the token a moment after the payment, so it is polled again.
        return _without_card(payment, TOKEN_MISSING, context.now + RECHECKS[0], context)
    if foreign:
        return _without_card(payment, FOREIGN_TOKEN, None, context)
    stored = replace(
        payment,
        status=move(payment.status, HostedStatus.STORED),
        outcome=said.statement.status,
        settled_at=context.now,
        next_poll_at=None,
    )
    return Concluded(stored, (), said.card)  # `stored` makes the event, once the card has an id


def _without_card(
    payment: HostedPayment, reason: str, next_poll_at: datetime | None, context: Context
) -> Concluded:
    if payment.status is not HostedStatus.NO_CARD:
        return _ended(payment, HostedStatus.NO_CARD, reason, next_poll_at, context)
    again = _next_recheck(payment, context) if next_poll_at else None
    return Concluded(replace(payment, next_poll_at=again))


def _unpaid(payment: HostedPayment, finding: Finding, context: Context) -> Concluded:
    """Apply a final, unpaid statement.

    The customer may still pay on the same page with another card. So the statement has to stand for
    the grace, and the gateway is polled again afterwards.
    """
    if payment.status is not HostedStatus.OPEN:
        return _still_unpaid(payment, finding, context)
    since = payment.unpaid_since or context.now
    over = since + context.timings.expiry_grace
    if payment.unpaid_since is None or context.now < over:
        waiting = replace(payment, unpaid_since=since, next_poll_at=over)
        shown = replace(waiting, outcome=finding.refusal or finding.reason)
        return Concluded(waiting, (_told(shown, EventKind.CARD_PAGE_POLLED, context),))
    first, outcome = context.now + RECHECKS[0], finding.refusal or finding.reason
    return _ended(payment, HostedStatus.UNPAID, outcome, first, context)


def _still_unpaid(payment: HostedPayment, finding: Finding, context: Context) -> Concluded:
    """Keep why the card was refused, if the gateway says so only after the end."""
    again = replace(payment, next_poll_at=_next_recheck(payment, context))
    if payment.status is not HostedStatus.UNPAID or finding.refusal in {None, payment.outcome}:
        return Concluded(again)
    refused = replace(again, outcome=finding.refusal)
    return Concluded(refused, (_told(refused, EventKind.CARD_PAGE_POLLED, context),))


def _undecided(payment: HostedPayment, finding: Finding, context: Context) -> Concluded:
    alert = finding.verdict is Verdict.CONTRADICTORY or payment.status is not HostedStatus.OPEN
    is_news = alert and payment.outcome != finding.reason
    outcome = finding.reason if alert else payment.outcome
    again = _ask_again(replace(payment, unpaid_since=None, outcome=outcome), context)
    if not is_news:
        return Concluded(again)
    return Concluded(again, (_told(again, EventKind.CARD_PAGE_POLLED, context, alert=True),))


def _ask_again(payment: HostedPayment, context: Context) -> HostedPayment:
    if payment.status is not HostedStatus.OPEN:
        return replace(payment, next_poll_at=_next_recheck(payment, context))
    age = context.now - (payment.opened_at or payment.created_at)
    wait = min(max(age / 4, context.timings.reconcile_after), LONGEST_EAGER_WAIT)
    return replace(
        payment, next_poll_at=context.now + (PATIENT_WAIT if age > EAGER_POLLS_FOR else wait)
    )


def _next_recheck(payment: HostedPayment, context: Context) -> datetime | None:
    ended = payment.settled_at or payment.created_at
    return next((ended + after for after in RECHECKS if ended + after > context.now), None)


def _ended(
    payment: HostedPayment,
    status: HostedStatus,
    outcome: str,
    next_poll_at: datetime | None,
    context: Context,
) -> Concluded:
    ended = replace(
        payment,
        status=move(payment.status, status),
        outcome=outcome,
        settled_at=context.now,
        next_poll_at=next_poll_at,
    )
    paid = status is HostedStatus.NO_CARD
    kind = EventKind.CARD_NOT_STORED if paid else EventKind.CARD_PAGE_UNPAID
    return Concluded(ended, (_told(ended, kind, context, alert=paid),))


def _told(
    payment: HostedPayment, kind: EventKind, context: Context, *, alert: bool = False
) -> Event:
    step = STEPS.get(payment.outcome or "")
    return context.event(
        kind,
        alert=alert,
        reference_id=payment.reference_id,
        customer=payment.customer_reference,
        reason=payment.outcome,
        **({"needs": step} if step else {}),
    )


def stored(payment: HostedPayment, card_id: int, mask: str | None, context: Context) -> Event:
    return context.event(
        EventKind.CARD_STORED,
        reference_id=payment.reference_id,
        customer=payment.customer_reference,
        card_id=card_id,
        mask=mask,
    )
