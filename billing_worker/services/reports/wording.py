"""One sentence about an invoice or a card page: its state and why, and what happens next
and when.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Row

from billing_worker.domain import card as cards
from billing_worker.domain.attempt import Origin
from billing_worker.domain.card_setup import STEPS, CardSetup, CardSetupStatus
from billing_worker.domain.declines import decline_for
from billing_worker.domain.invoice import (
    CANCELLED,
    EXPIRED_AGAIN,
    EXPIRED_UNPROVEN,
    KEEPS_CRASHING,
    LATE_MONEY,
    ONE_A_DAY,
    PAUSED,
    RECOVERY_ENDED,
    TOO_OLD,
    is_paid_elsewhere,
)
from billing_worker.domain.outcome import PAID_BY_WORD
from billing_worker.domain.outgoing.notice import ACCEPTED_LATE, NOT_ACCEPTED
from billing_worker.persistence.claims import AFTER_OLDER
from billing_worker.persistence.invoices import (
    MISFIT,
    MODERATED,
    PAGE,
    REOPENED,
    SILENT,
    UNDECIDED,
)


class Fate(StrEnum):
    """The state of a period: exactly one of these at any time."""

    PAID = "paid"
    UNCOLLECTIBLE = "uncollectible"
    VOID = "void"
    UNKNOWN = "unknown"  # The card may have been charged.
    LINK = "open, pay link out, customer has not paid"
    IN_FLIGHT = "open, being charged"
    DATED = "open, next attempt dated"
    FOR_A_CARD = "open, waiting for a card"
    FOR_THE_CUSTOMER = "open, waiting for the customer"
    FOR_A_PERSON = "open, waiting for a person"
    PAUSED = "open, paused"


KNOWN_IN_WORDS = {
    SILENT: "no answer yet",
    UNDECIDED: "gateway undecided",
    MODERATED: "held for moderation at the gateway",
    MISFIT: "gateway's answer does not fit the order",
    REOPENED: "gateway has taken back that it was unpaid",
}

_NO_CARD = ("card_missing", "card_unusable", cards.CARD_EXPIRED)


def fate_of(
    status: str,
    attempt_status: str | None,
    *,
    known: str | None,
    waits: bool,
    reason: str | None,
    patient: bool,
) -> Fate:
    """Return the fate.

    `known`: what is known of an attempt that may still be paid. `waits`: no attempt has a date.
    `patient`: the customer is waited for until a date.
    """
    may_be_paid = known not in {None, PAGE}
    if status != "open":
        return Fate.UNKNOWN if status == Fate.UNCOLLECTIBLE and may_be_paid else Fate(status)
    if known is not None:
        return Fate.LINK if known == PAGE else Fate.UNKNOWN
    reason = reason or ""
    if attempt_status == "prepared" and not (waits and reason.startswith(KEEPS_CRASHING)):
        return Fate.IN_FLIGHT
    return _turn(reason, patient=patient) if waits else Fate.DATED


def _turn(reason: str, *, patient: bool) -> Fate:
    if reason == PAUSED:
        return Fate.PAUSED
    if reason.startswith(KEEPS_CRASHING):
        return Fate.FOR_A_PERSON
    if reason.startswith(_NO_CARD):
        return Fate.FOR_A_CARD
    if not patient:
        return Fate.FOR_A_PERSON
    needs_customer = reason.startswith("declined_needs_customer")
    return Fate.FOR_THE_CUSTOMER if needs_customer else Fate.FOR_A_CARD


@dataclass(frozen=True, slots=True)
class Told:
    why: str
    next: str


@dataclass(frozen=True, slots=True)
class ChargedNotBefore:
    """What may hold back a charge whose date has come."""

    switched: str | None = None  # what has to be switched on first
    late_money: datetime | None = None  # until when an earlier attempt may still be paid
    too_late: str | None = None  # why the next step of recovery is not made any more


def about_invoice(
    invoice: Row[Any],
    newest: Row[Any] | None,
    fate: Fate,
    known: str | None,
    *,
    payer: Row[Any] | None,
    until: ChargedNotBefore,
    unusable: tuple[datetime, str] | None = None,
) -> Told:
    """Return the sentence about an invoice.

    `newest`: its newest attempt, or the one that may still be paid; `known`: what is known of it.
    `payer`: the attempt that paid the invoice. `unusable`: when an answer about `newest` could not be
    used, and why.
    """
    if newest is not None and fate in {Fate.UNKNOWN, Fate.LINK}:
        told = _about_submitted(invoice, newest, known or SILENT)
        if unusable is None:
            return told
        at, trouble = unusable
        return Told(f"{told.why[:-1]}. At {_moment(at)} its answer could not be used: {trouble}.",
                    told.next)  # fmt: skip
    reason = reason_in_words(invoice.reason)
    match fate:
        case Fate.DATED | Fate.IN_FLIGHT:
            why, next_ = _why_charged(newest, reason), _when_charged(invoice, until)
        case Fate.PAID:
            why, next_ = _who_says_paid(invoice, payer), "Nothing more is charged for it"
        case _:
            why = f"{_WHY[fate]}: {reason}" if reason else _WHY[fate]
            if known == PAGE and newest is not None:
                asked = _moment(newest.next_poll_at)
                return Told(f"{why}.", f"{_PAGE_OUT}; the gateway is asked again at {asked}.")
            next_ = _NEXT[fate].format(
                invoice=invoice.reference_id,
                subscription=invoice.subscription_reference,
                until=_patience(invoice),
            )
    return Told(f"{why}.", f"{next_}.")


def _who_says_paid(invoice: Row[Any], payer: Row[Any] | None) -> str:
    if is_paid_elsewhere(invoice.reason):
        return f"A person has marked it as {invoice.reason}"
    if payer is not None and payer.outcome == PAID_BY_WORD:
        resolved = f"at {_moment(payer.resolved_at)}"
        return f"A person stated {resolved} that it was paid, and the gateway has not decided"
    return "The gateway states that it was paid"


_WHY = {
    Fate.VOID: "It is not owed",
    Fate.UNCOLLECTIBLE: "It was given up",
    Fate.PAUSED: "Its subscription is paused",
    Fate.FOR_A_CARD: "No card can be charged",
    Fate.FOR_THE_CUSTOMER: "The customer has to take part",
    Fate.FOR_A_PERSON: "Nothing more may be tried before a person has looked",
}
_PAGE_OUT = "A page to pay on is out, and money there pays it"
_NEXT = {
    Fate.VOID: "Nothing; money that comes all the same is surplus, and a person is told",
    Fate.UNCOLLECTIBLE: "Nothing by itself; `invoices pay-link {invoice}` lets the customer pay, a "
    "new card (`cards replace`) or `invoices retry {invoice}` charges it again, and late money still "
    "pays it",
    Fate.PAUSED: "Nothing before its pause ends (`subscriptions resume {subscription}` ends it)",
    Fate.FOR_A_CARD: "Charged as soon as the customer gives another card (`cards replace "
    "{subscription}`, or `cards tokenise --invoice {invoice}`){until}",
    Fate.FOR_THE_CUSTOMER: "Nothing before the customer pays (`invoices pay-link {invoice}`) or "
    "gives another card{until}",
    Fate.FOR_A_PERSON: "Nothing by itself; `invoices retry {invoice}` charges it, `invoices void "
    "{invoice}` ends it, `catch-up` decides what was held there",
}


def next_of(fate: Fate, invoice: str, subscription: str) -> str:
    """Return what has to happen before an invoice of this fate is charged again."""
    return f"{_NEXT[fate].format(invoice=invoice, subscription=subscription, until='')}."


def _why_charged(newest: Row[Any] | None, reason: str) -> str:
    if newest is None:
        return f"Its period is due: {reason}" if reason else "Its period is due"
    if newest.status == "prepared":
        because = f"; the last time: {reason}" if reason else ""
        return f"Attempt {newest.number} is prepared, nothing has been sold{because}"
    if newest.origin == Origin.LINK:
        # The reason of the invoice is that of the attempt before the page.
        before = f"; before it: {reason}" if newest.number > 1 and reason else ""
        own = reason_in_words(newest.outcome)
        return f"Attempt {newest.number}, a page to pay on, ended without money: {own}{before}"
    return f"Attempt {newest.number} ended without money: {reason or newest.outcome}"


def _when_charged(invoice: Row[Any], until: ChargedNotBefore) -> str:
    at = invoice.enqueue_at or invoice.next_attempt_at
    if until.too_late is not None:
        why = until.too_late.removeprefix(RECOVERY_ENDED)
        person = _NEXT[Fate.FOR_A_PERSON].format(invoice=invoice.reference_id)
        return person.replace("Nothing by itself", f"Nothing by itself, because {why}", 1)
    switched = f", but not before {until.switched}" if until.switched else ""
    if invoice.reason == AFTER_OLDER:
        when = (
            "It is charged once the older invoice is paid or given up; while the outcome of that one "
            "is unknown, BILLING_UNKNOWN_BLOCKS_SECONDS (7 days) after its sale at the latest"
        )
        return when + switched
    if at is not None and invoice.reason == NOT_ACCEPTED:
        return (
            f"It is charged once a notice was accepted early enough: looked at again at "
            f"{at.isoformat()} (`webhooks deliveries --failed` shows why a receiver refuses it; "
            f"`subscriptions notice-sent {invoice.subscription_reference}` says that it was sent)"
        ) + switched
    if at is not None and until.late_money is not None and until.late_money > at:
        return (
            f"It is charged at {until.late_money.isoformat()}, because an earlier attempt may still "
            f"be paid until then{switched}"
        )
    return (f"It is charged at {at.isoformat()}" if at else "A worker takes it up") + switched


def _patience(invoice: Row[Any]) -> str:
    return f"; given up at {invoice.give_up_at.isoformat()}" if invoice.give_up_at else ""


def _about_submitted(invoice: Row[Any], newest: Row[Any], known: str) -> Told:
    asked = f"The gateway is asked again at {_moment(newest.next_poll_at)}"
    if newest.unpaid_since is not None:
        return Told(
            f"The gateway has called attempt {newest.number} unpaid since "
            f"{newest.unpaid_since.isoformat()}, and late money is waited for.",
            f"{asked}; if it says the same then, the attempt has ended without money.",
        )
    if known == PAGE:
        step = _moment(invoice.next_attempt_at) if invoice.next_attempt_at else "none is dated"
        return Told(
            "A page to pay on is out, and the gateway knows of no payment there.",
            f"{asked}; nothing is charged while the page is open (after it, the next attempt: "
            f"{step}).",
        )
    number = newest.number
    said = {
        SILENT: f"The sale of attempt {number} was sent, or may have been, and nobody has answered",
        UNDECIDED: f"The gateway answers and has not decided about attempt {number}; of a sale that "
        "never arrived it says the same",
        MODERATED: f"The gateway holds attempt {number} for moderation: somebody there has to release "
        "or refuse it",
        MISFIT: f"What the gateway says of attempt {number} does not fit: {newest.outcome}",
        REOPENED: f"Attempt {number} had ended unpaid ({newest.outcome}), and the gateway has taken "
        f"that back at {_moment(newest.undecided_since)}",
    }
    if invoice.void_if_unpaid:
        return Told(f"{said[known]}.", f"{asked}; it is void as soon as that has ended unpaid.")
    return Told(
        f"{said[known]}.",
        f"{asked}; nothing else is tried until it says paid or unpaid, or a person does "
        f"(`invoices resolve {newest.reference_id}`).",
    )


def _moment(moment: datetime | None) -> str:
    return moment.isoformat() if moment else "no date"


def reason_in_words(reason: str | None) -> str:
    """Return the invoice's reason. A code of the gateway is followed by its meaning."""
    kind, _, resolution = (reason or "").partition(": ")
    if kind.startswith("declined_"):
        return f"{decline_for(resolution).reason} ({resolution})"
    if kind == "recovery_ended":
        return f"its recovery has ended, after: {reason_in_words(resolution)}"
    if kind == KEEPS_CRASHING:
        return f"waits for a person: {resolution or 'its worker died again and again'}"
    if reason == PAUSED:
        return ""
    return {
        "card_missing": "there is no card on file",
        cards.CARD_EXPIRED: "the card on file has expired",
        CANCELLED: "its subscription was cancelled",
        "not_charged": "certainly nothing was charged",
        "not_charged_repeatedly": "the sale of several attempts in a row was never sent",
        EXPIRED_UNPROVEN: "its sale may have arrived, and the gateway's invoice expired undecided: late "
        "approval is waited for before the next attempt",
        EXPIRED_AGAIN: "two sales may have arrived, and both invoices at the gateway expired "
        "undecided: compare with the gateway's own pages before anything else is charged",
        LATE_MONEY: "an earlier attempt may still be paid, so the next one waits",
        ONE_A_DAY: "another card was given, and it collects one debt a day, the oldest first",
        TOO_OLD: "it was older than 62 days when another card was given, and is not charged by "
        "itself",
        NOT_ACCEPTED: "its customer has to be told some days before, and nobody has accepted the notice "
        "or said that it was sent (docs/notices.md)",
        ACCEPTED_LATE: "its customer was told, and the days between notice and charge are not over",
        "link_not_paid": "the customer did not pay on the page",
    }.get(reason or "", reason or "")


# --- card pages -------------------------------------------------------------------------------

FATE_OF_PAGE = {
    CardSetupStatus.PREPARED: "being opened",
    CardSetupStatus.OPEN: "open, customer has not paid",
    CardSetupStatus.STORED: "paid, card stored",
    CardSetupStatus.NO_CARD: "paid, no card came of it",
    CardSetupStatus.UNPAID: "not paid",
}


def about_page(payment: CardSetup) -> Told:
    """Return the sentence about a card set-up."""
    again = f"The gateway is asked again at {_moment(payment.next_poll_at)}"
    match payment.status:
        case CardSetupStatus.PREPARED:
            return Told("Nobody has the page yet.", f"{again}; if nobody has it then, it is over.")
        case CardSetupStatus.OPEN:
            return Told(_known_of_page(payment), f"{again}.")
        case CardSetupStatus.STORED:
            return Told("The customer paid, and the card is stored.", "Nothing.")
        case CardSetupStatus.NO_CARD:
            step = STEPS.get(payment.outcome or "", "a person looks")
            return Told(f"The customer paid, but {payment.outcome}.", f"Not by itself: {step}.")
        case CardSetupStatus.UNPAID:
            recheck = (
                f"{again}: late money still stores the card."
                if payment.next_poll_at
                else "Nothing."
            )
            return Told(f"Nobody paid there: {payment.outcome}.", recheck)


def _known_of_page(payment: CardSetup) -> str:
    if payment.unpaid_since is not None:
        return f"The gateway has called it unpaid since {payment.unpaid_since.isoformat()}."
    if payment.outcome is not None:
        return f"What the gateway says of the page does not fit, and a person looks: {payment.outcome}."
    return "The page is out, and no payment is known."
