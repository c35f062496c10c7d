"""The kinds of news about an attempt, what they are about, and what is concluded from them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from billing_worker.domain.attempt import Attempt, Origin
from billing_worker.domain.card import Card
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.statement import NOT_SAID, Expected, Owner, Statement
from billing_worker.domain.subscription import Subscription
from billing_worker.domain.timings import Timings


@dataclass(frozen=True, slots=True)
class Stated:
    """The gateway stated this about the attempt's invoice."""

    statement: Statement
    asked_at: datetime | None = None
    """When the poll was sent: a slow answer must not undo a newer one. None: not compared."""
    maybe_sold: bool = False
    """This book has no record of creating the invoice, so somebody else may have sold it."""


@dataclass(frozen=True, slots=True)
class NothingSent:
    """The worker that holds the claim gives the attempt up and is certain that it sent no sale."""

    reason: str
    hold: bool = False  # True: a repetition would fail in the same way
    statement: Statement | None = None  # the gateway's invoice that was not sold, if any


@dataclass(frozen=True, slots=True)
class Postponed:
    """The worker gives a prepared attempt back, to continue later. It sent no sale.

    `maybe_sold`: a life that these books have forgotten, or another book, may have sent one.
    """

    reason: str
    until_it_ends: bool = False
    """It waits for the end of an invoice at the gateway, which may take days: asked hourly then."""
    maybe_sold: bool = False


@dataclass(frozen=True, slots=True)
class Forbidden:
    """A rule forbids a prepared attempt, so no sale was sent. `again_at` None: for ever."""

    rule: str
    reason: str
    again_at: datetime | None


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A poll or a sale had no usable answer. It proves nothing."""

    reason: str


@dataclass(frozen=True, slots=True)
class NeverHandedOut:
    """Nobody was given the page of this pay link, and the gateway lists nothing for its reference.
    For a withdrawn charge: the gateway lists nothing that tells whether it was sold.
    """

    found: str | None = None
    """What it lists instead: an invoice of which nobody can tell whether it was sold."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A named person decides whether an attempt of unknown outcome was paid."""

    paid: bool
    evidence: str
    why: str
    over: str | None = None  # the gateway's last statement, as the person saw it


News = Stated | NothingSent | Postponed | Forbidden | NoAnswer | NeverHandedOut | Resolved


@dataclass(frozen=True, slots=True)
class Case:
    """An attempt with the invoice and the subscription that it belongs to.

    The next step after an unpaid end also depends on the invoice's previous attempts and on the
    customer's cards. These are read only when the news may be such an end.
    """

    attempt: Attempt
    invoice: Invoice
    subscription: Subscription
    earlier: tuple[Attempt, ...] = ()
    card: Card | None = None
    other_card: Origin | None = None  # the origin of a charge with another card, if there is one
    default_card: Card | None = None  # the subscription's card by now
    equal_charge: str | None = None  # paid, of the same card and amount, shortly before
    undecided_equal: str | None = None  # the same, and the gateway has not decided about it
    owes_more: bool = False  # another invoice is in recovery, or waits for a person
    owner: Owner = NOT_SAID  # our book, and the customer of the subscription

    @property
    def expected(self) -> Expected:
        """What the gateway's statements about the attempt are compared with."""
        one = self.attempt
        return Expected(one.reference_id, one.money, test_mode=one.test_mode, owner=self.owner)


@dataclass(frozen=True, slots=True)
class Conclusion:
    case: Case
    events: tuple[Event, ...]
    kills_card: str | None = None  # why the attempt's card must never be charged again
    pauses_service: str | None = None  # why the gateway service may charge nothing for now


@dataclass(frozen=True, slots=True)
class Context:
    now: datetime
    by: str  # who brings the news: "charge", "reconcile", "operator:ann" …
    timings: Timings

    def event(self, kind: EventKind, *, alert: bool = False, **data: object) -> Event:
        return Event(kind, self.now, self.by, data, alert)
