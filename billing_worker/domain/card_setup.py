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
class PageStatement:
    """The gateway's statement about an invoice that is paid on a page. None: not stated."""

    statement: Statement
    page: Page | None = None
    card: StoredCard | None = None
    alone: bool = True  # no other one of ours was found under its reference
    made_by_somebody: bool = False
    """This book did not create the invoice, so somebody else may have its page."""


# --- what we keep -----------------------------------------------------------------------------


class CardSetupStatus(StrEnum):
    PREPARED = "prepared"  # Recorded; nobody has the page.
    OPEN = "open"  # It may be paid. Only a statement of the gateway ends this.
    STORED = "stored"
    NO_CARD = "no_card"
    UNPAID = "unpaid"


TRANSITIONS: Mapping[CardSetupStatus, frozenset[CardSetupStatus]] = {
    CardSetupStatus.PREPARED: frozenset({CardSetupStatus.OPEN, CardSetupStatus.UNPAID}),
    CardSetupStatus.OPEN: frozenset(
        {CardSetupStatus.STORED, CardSetupStatus.NO_CARD, CardSetupStatus.UNPAID}
    ),
    # A final status of the gateway may change (gateway.md §0 H), and a token may come late.
    CardSetupStatus.UNPAID: frozenset({CardSetupStatus.STORED, CardSetupStatus.NO_CARD}),
    CardSetupStatus.NO_CARD: frozenset({CardSetupStatus.STORED}),
    CardSetupStatus.STORED: frozenset(),
}

PAID_SETUPS = frozenset({CardSetupStatus.STORED, CardSetupStatus.NO_CARD})


def move(current: CardSetupStatus, to: CardSetupStatus) -> CardSetupStatus:
    """Return `to`. Raises IllegalTransition when TRANSITIONS does not allow the change."""
    if to not in TRANSITIONS[current]:
        raise IllegalTransition(f"card setup: {current} -> {to}")
    return to


@dataclass(frozen=True, slots=True)
class CardSetup:
    id: int
    reference_id: str  # the caller's
    gateway_reference: str  # our reference at the gateway
    customer_id: int
    customer_reference: str
    attempt_id: int | None  # holds the slot of the invoice that it pays, if any
    money: Money
    test_mode: bool
    status: CardSetupStatus
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
class ConcludedSetup:
    setup: CardSetup
    events: tuple[Event, ...] = ()
    keep: StoredCard | None = None  # a card to store; it has a token


# --- news -------------------------------------------------------------------------------------


def conclude(
    setup: CardSetup,
    said: PageStatement | None,
    context: Context,
    *,
    token_is_foreign: bool = False,
    not_handed_out: str = SETUP_NEVER_HANDED_OUT,
) -> ConcludedSetup:
    """Apply a statement of the gateway.

    `said` None: no answer, which proves nothing. For a prepared setup None means that the gateway
    knows no such invoice.
    `token_is_foreign`: the stated token is already stored for another customer.
    `not_handed_out`: why nobody was given the page of a prepared setup.
    """
    if said is not None and setup.gateway_id is None and _is_foreign(setup, said):
        said = None
    setup = _with_gateway_id(setup, said)
    if setup.status is CardSetupStatus.PREPARED:
        if said is None or setup.gateway_id is None or not page_may_be_paid(said.statement):
            return given_up(setup, not_handed_out, context)
        touched = move(setup.status, CardSetupStatus.OPEN)
        setup = replace(setup, status=touched, opened_at=context.now)
    if said is None:
        return ConcludedSetup(_ask_again(setup, context))
    finding = judge(said.statement, setup.expected)
    match finding.verdict:
        case Verdict.PAID:
            return _paid(setup, said, context, token_is_foreign=token_is_foreign)
        case Verdict.DECLINED | Verdict.UNPAID_FINAL:
            return _unpaid(setup, finding, context)
        case Verdict.CONTRADICTORY | Verdict.PENDING:
            return _undecided(setup, finding, context)


def _is_foreign(setup: CardSetup, said: PageStatement) -> bool:
    """Whether an invoice found by our reference belongs to another book or customer."""
    return foreign(said.statement, setup.whose) is not None


def _with_gateway_id(setup: CardSetup, said: PageStatement | None) -> CardSetup:
    if said is None or setup.gateway_id is not None:
        return setup
    # The answer to our own create may leave the reference out.
    if said.statement.reference_id not in {None, setup.gateway_reference}:
        return setup
    return replace(setup, gateway_id=said.statement.gateway_id)


def given_up(setup: CardSetup, reason: str, context: Context) -> ConcludedSetup:
    """End a prepared setup whose page nobody was given.

    The gateway is polled again later: it may charge a known card when it creates the page.
    """
    return _ended(setup, CardSetupStatus.UNPAID, reason, context.now + RECHECKS[0], context)


def _paid(
    setup: CardSetup, said: PageStatement, context: Context, *, token_is_foreign: bool
) -> ConcludedSetup:
    if setup.status is CardSetupStatus.STORED:
        return ConcludedSetup(replace(setup, next_poll_at=None))
    foreign = token_is_foreign or said.statement.owner.customer not in {
        None,
        setup.customer_reference,
    }
    if said.card is None or said.card.token is None:
        # The gateway may create the token a moment after the payment, so it is polled again.
        return _without_card(setup, TOKEN_MISSING, context.now + RECHECKS[0], context)
    if foreign:
        return _without_card(setup, FOREIGN_TOKEN, None, context)
    stored = replace(
        setup,
        status=move(setup.status, CardSetupStatus.STORED),
        outcome=said.statement.status,
        settled_at=context.now,
        next_poll_at=None,
    )
    return ConcludedSetup(
        stored, (), said.card
    )  # `stored` makes the event, once the card has an id


def _without_card(
    setup: CardSetup, reason: str, next_poll_at: datetime | None, context: Context
) -> ConcludedSetup:
    if setup.status is not CardSetupStatus.NO_CARD:
        return _ended(setup, CardSetupStatus.NO_CARD, reason, next_poll_at, context)
    again = _next_recheck(setup, context) if next_poll_at else None
    return ConcludedSetup(replace(setup, next_poll_at=again))


def _unpaid(setup: CardSetup, finding: Finding, context: Context) -> ConcludedSetup:
    """Apply a final, unpaid statement.

    The customer may still pay on the same page with another card. So the statement has to stand for
    the grace, and the gateway is polled again afterwards.
    """
    if setup.status is not CardSetupStatus.OPEN:
        return _still_unpaid(setup, finding, context)
    since = setup.unpaid_since or context.now
    over = since + context.timings.expiry_grace
    if setup.unpaid_since is None or context.now < over:
        waiting = replace(setup, unpaid_since=since, next_poll_at=over)
        shown = replace(waiting, outcome=finding.refusal or finding.reason)
        return ConcludedSetup(waiting, (_told(shown, EventKind.CARD_PAGE_POLLED, context),))
    first, outcome = context.now + RECHECKS[0], finding.refusal or finding.reason
    return _ended(setup, CardSetupStatus.UNPAID, outcome, first, context)


def _still_unpaid(setup: CardSetup, finding: Finding, context: Context) -> ConcludedSetup:
    """Keep why the card was refused, if the gateway says so only after the end."""
    again = replace(setup, next_poll_at=_next_recheck(setup, context))
    if setup.status is not CardSetupStatus.UNPAID or finding.refusal in {None, setup.outcome}:
        return ConcludedSetup(again)
    refused = replace(again, outcome=finding.refusal)
    return ConcludedSetup(refused, (_told(refused, EventKind.CARD_PAGE_POLLED, context),))


def _undecided(setup: CardSetup, finding: Finding, context: Context) -> ConcludedSetup:
    alert = finding.verdict is Verdict.CONTRADICTORY or setup.status is not CardSetupStatus.OPEN
    is_news = alert and setup.outcome != finding.reason
    outcome = finding.reason if alert else setup.outcome
    again = _ask_again(replace(setup, unpaid_since=None, outcome=outcome), context)
    if not is_news:
        return ConcludedSetup(again)
    return ConcludedSetup(again, (_told(again, EventKind.CARD_PAGE_POLLED, context, alert=True),))


def _ask_again(setup: CardSetup, context: Context) -> CardSetup:
    if setup.status is not CardSetupStatus.OPEN:
        return replace(setup, next_poll_at=_next_recheck(setup, context))
    age = context.now - (setup.opened_at or setup.created_at)
    wait = min(max(age / 4, context.timings.reconcile_after), LONGEST_EAGER_WAIT)
    return replace(
        setup, next_poll_at=context.now + (PATIENT_WAIT if age > EAGER_POLLS_FOR else wait)
    )


def _next_recheck(setup: CardSetup, context: Context) -> datetime | None:
    ended = setup.settled_at or setup.created_at
    return next((ended + after for after in RECHECKS if ended + after > context.now), None)


def _ended(
    setup: CardSetup,
    status: CardSetupStatus,
    outcome: str,
    next_poll_at: datetime | None,
    context: Context,
) -> ConcludedSetup:
    ended = replace(
        setup,
        status=move(setup.status, status),
        outcome=outcome,
        settled_at=context.now,
        next_poll_at=next_poll_at,
    )
    paid = status is CardSetupStatus.NO_CARD
    kind = EventKind.CARD_NOT_STORED if paid else EventKind.CARD_PAGE_UNPAID
    return ConcludedSetup(ended, (_told(ended, kind, context, alert=paid),))


def _told(setup: CardSetup, kind: EventKind, context: Context, *, alert: bool = False) -> Event:
    step = STEPS.get(setup.outcome or "")
    return context.event(
        kind,
        alert=alert,
        reference_id=setup.reference_id,
        customer=setup.customer_reference,
        reason=setup.outcome,
        **({"needs": step} if step else {}),
    )


def stored(setup: CardSetup, card_id: int, mask: str | None, context: Context) -> Event:
    return context.event(
        EventKind.CARD_STORED,
        reference_id=setup.reference_id,
        customer=setup.customer_reference,
        card_id=card_id,
        mask=mask,
    )
