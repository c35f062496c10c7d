"""What may be heard about an attempt, what it is about, and what is concluded from it."""

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
    """When it was asked: a slow answer must not undo a newer one. None: nobody could be slower."""
    maybe_sold: bool = False
    """No create of this book is known to have made this invoice: it may have been sold too."""


@dataclass(frozen=True, slots=True)
class NothingSent:
    """The frame that owns the attempt knows that no sale left it, and gives the attempt up."""

    reason: str
    hold: bool = False  # True: repeating it would fail the same way
    statement: Statement | None = None  # the gateway's invoice that was not sold, if any


@dataclass(frozen=True, slots=True)
class Postponed:
    """The frame gives a prepared attempt back: same attempt, later. No money call was made."""

    reason: str


@dataclass(frozen=True, slots=True)
class Forbidden:
    """A rule stands against a prepared attempt, so nothing was sold. `again_at` None: for ever."""

    rule: str
    reason: str
    again_at: datetime | None


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Asking, or selling, brought no usable answer. Proves nothing."""

    reason: str


@dataclass(frozen=True, slots=True)
class NeverHandedOut:
    """Nobody was given the page of this link, and the gateway has nothing under its reference. Or of
    a withdrawn charge: nothing there that says whether it was sold.
    """


@dataclass(frozen=True, slots=True)
class Resolved:
    """A named person says whether an attempt of unknown outcome was paid."""

    paid: bool
    evidence: str
    why: str
    over: str | None = None  # what the gateway last said of it, which the person has seen


News = Stated | NothingSent | Postponed | Forbidden | NoAnswer | NeverHandedOut | Resolved


@dataclass(frozen=True, slots=True)
class Case:
    """An attempt with the invoice and the subscription that it belongs to.

    What follows an end without money also depends on the invoice's earlier attempts and on the
    customer's cards: they are read when the news may be such an end, and only then.
    """

    attempt: Attempt
    invoice: Invoice
    subscription: Subscription
    earlier: tuple[Attempt, ...] = ()
    card: Card | None = None
    other_card: Origin | None = None  # another card that may be charged now, and as what
    default_card: Card | None = None  # what the subscription is charged with by now
    owes_more: bool = False  # another invoice of the subscription is in recovery, or held
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
    pauses_service: str | None = None  # why nothing may be charged through the service for now


@dataclass(frozen=True, slots=True)
class Context:
    now: datetime
    by: str  # who brings the news: "charge", "reconcile", "operator:ann" …
    timings: Timings

    def event(self, kind: EventKind, *, alert: bool = False, **data: object) -> Event:
        return Event(kind, self.now, self.by, data, alert)
