"""What the gateway said about one of its payment invoices, and what that proves.

Every rule here cites `gateway.md` of the project's design papers by section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret


@dataclass(frozen=True, slots=True)
class Owner:
    """To which book and customer an invoice belongs. None: not stated, which proves nothing."""

    book: str | None = None  # the identity sent with the create; two books may share an account
    customer: str | None = None  # our reference of the customer
    former_book: str | None = None  # the book that billed it before the subscription moved to ours
    was_elsewhere: bool = False
    """The subscription was handed over and taken back, and its references have a prefix that no
    other book uses. So another book that created an invoice under them billed it in our place.
    """


NOT_SAID = Owner()


@dataclass(frozen=True, slots=True)
class Statement:
    """One payment invoice as the gateway states it, already parsed and typed.

    Amounts are exact decimals in major units. None: not stated.
    """

    gateway_id: str
    status: str
    resolution: str | None = None
    reference_id: str | None = None
    amount: Decimal | None = None
    payment_amount: Decimal | None = None
    processed_amount: Decimal | None = None
    currency: str | None = None
    test_mode: bool | None = None
    moderation_required: bool = False
    original_code: str | None = None  # the acquirer's own resolution, verbatim (§2.2)
    bearer: Secret | None = field(default=None, repr=False)
    owner: Owner = NOT_SAID
    create: str | None = None  # the name of the create that made it, as the gateway echoes it
    created_at: datetime | None = None  # by the gateway's clock


@dataclass(frozen=True, slots=True)
class SaleAnswer:
    """What the answer to POST /payment/sale claims: a hint, never a proof about money."""

    http_status: int
    status: str | None = None
    resolution: str | None = None
    needs_customer: bool = False
    """The answer asks for a 3-D Secure step, and no customer is present to take it."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What we ordered: every statement is compared with it."""

    reference_id: str
    money: Money
    test_mode: bool
    owner: Owner = NOT_SAID


class Verdict(StrEnum):
    PAID = "paid"  # The gateway states that the full amount was paid.
    DECLINED = "declined"  # Final failure with a resolution: nothing moved.
    UNPAID_FINAL = "unpaid_final"  # Ended unpaid (expired, terminated, rejected); true after grace.
    PENDING = "pending"  # Not decided; ask again.
    CONTRADICTORY = "contradictory"  # Does not match the order: hold, keep the evidence, alert.


PAID_STATUSES = frozenset(
    {
        "processed",
        # Money was taken and something happened to it afterwards (§3.1).
        "refunding",
        "refund_pending",
        "refund_error",
        "refund_failed",
        "partially_refunded",
        "refunded",
        "charged_back",
        "partially_charged_back",
    }
)
CHARGED_BACK_STATUSES = frozenset({"charged_back", "partially_charged_back"})
GIVEN_BACK_STATUSES = CHARGED_BACK_STATUSES | {
    "refunding",
    "refund_pending",
    "partially_refunded",
    "refunded",
}
DECLINED_STATUSES = frozenset({"process_failed"})
UNPAID_FINAL_STATUSES = frozenset({"expired", "terminated", "rejected"})
PENDING_STATUSES = frozenset({"created", "processing", "process_pending", "process_error"})
UNSOLD_STATUSES = frozenset({"created", "process_pending"})  # what a fresh invoice shows (§0 A)
# `partially_processed`, `verified`, `verify_failed` and anything new contradict an instant charge.


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, and a reason for a person to read."""

    verdict: Verdict
    reason: str
    refusal: str | None = None
    """With UNPAID_FINAL: the resolution, if it says why the charge was refused."""


def mismatch(statement: Statement, expected: Expected) -> str | None:
    """Describe the first field that is not what we ordered, or return None.

    `payment_amount` counts too: with some fee strategies the card is charged `amount + fee`
    (§11.5), which the customer has not agreed to. A missing field is a mismatch.
    """
    ours = {
        "reference_id": expected.reference_id,
        "amount": expected.money,
        "payment_amount": expected.money,
        "currency": expected.money.currency,
        "test_mode": expected.test_mode,
    }
    for name, value in ours.items():
        theirs = getattr(statement, name)
        if isinstance(value, Money):
            if theirs is None or not value.is_stated_by(theirs):
                return f"{name} is {theirs!s}, expected {value.amount!s}"
        elif theirs != value:
            return f"{name} is {theirs!s}, expected {value!s}"
    return foreign(statement, expected)


def foreign(statement: Statement, expected: Expected) -> str | None:
    """Describe the owner if the invoice belongs to another book or customer, or return None.

    Two books on one gateway account may use the same reference. A missing value proves nothing:
    old invoices carry no book identity, and not every answer names the customer.
    """
    ours = expected.owner
    for name, theirs, mine in (
        ("book", statement.owner.book, ours.book),
        ("customer", statement.owner.customer, ours.customer),
    ):
        moved = name == "book" and (ours.was_elsewhere or theirs == ours.former_book)
        if theirs is not None and mine is not None and theirs != mine and not moved:
            return f"the invoice belongs to another {name}: {theirs}, expected {mine}"
    return None


CLOCKS_DIFFER = timedelta(minutes=1)
"""Largest expected difference between the gateway's clock and ours."""


def is_of_another_create(answered: Statement, create: str | None, sent_at: datetime) -> bool:
    """Whether the answer to a create shows an invoice that an older create has made.

    Some gateways answer a known reference with the existing invoice (§0 D), which may have been
    sold. `create` is the name that was sent; `sent_at` is not later than the request.
    """
    if answered.create is not None:
        return answered.create != create
    made_at = answered.created_at
    return made_at is not None and made_at < sent_at - CLOCKS_DIFFER


def judge(statement: Statement, expected: Expected) -> Finding:
    """Decide what a statement proves about the money.

    Only the status of the gateway's own invoice decides (§0 A, J); the resolution merely classifies
    a failure. A `mismatch` in any field makes the statement contradictory, whatever its status.
    """
    wrong = mismatch(statement, expected)
    if wrong:
        return Finding(Verdict.CONTRADICTORY, wrong)
    status = statement.status
    if status in PAID_STATUSES:
        return _judge_paid(statement, expected)
    if status in DECLINED_STATUSES:
        return Finding(Verdict.DECLINED, statement.resolution or "no resolution given")
    if status in UNPAID_FINAL_STATUSES:
        return Finding(Verdict.UNPAID_FINAL, status, refusal_of(statement))
    if status in PENDING_STATUSES:
        held = f"; {MODERATION}" if statement.moderation_required else ""
        return Finding(Verdict.PENDING, status + held)
    return Finding(Verdict.CONTRADICTORY, f"status {status!s} does not belong to an instant charge")


MODERATION = "held for moderation"
"""How the finding ends about a charge that a person at the gateway has to release."""


def refusal_of(statement: Statement) -> str | None:
    """Return why an ended charge was refused, or None: no resolution and `ok` are no refusal."""
    return None if statement.resolution in {None, "", "ok"} else statement.resolution


def _judge_paid(statement: Statement, expected: Expected) -> Finding:
    # Some gateways leave processed_amount out; a different one is a partial payment (§0 I).
    processed = statement.processed_amount
    if processed is not None and not expected.money.is_stated_by(processed):
        return Finding(
            Verdict.CONTRADICTORY,
            f"processed_amount is {processed!s}, expected {expected.money.amount!s}",
        )
    return Finding(Verdict.PAID, statement.status)


NO_BEARER = "no bearer for the sale"


def may_be_sold(statement: Statement, expected: Expected) -> str | None:
    """Return why no sale may be sent for this invoice, or None.

    Called right before `submitted` is committed.
    """
    if statement.bearer is None:
        return may_be_paid(statement, expected) or NO_BEARER
    return may_be_paid(statement, expected)


def may_be_paid(statement: Statement, expected: Expected) -> str | None:
    """Return why neither a sale may be sent nor the page be handed out, or None.

    Moderation blocks an invoice (§2.2). Any status but that of a fresh invoice means that somebody
    else has used it.
    """
    wrong = mismatch(statement, expected)
    if wrong:
        return wrong
    if statement.status not in UNSOLD_STATUSES:
        return f"status is {statement.status}, expected a fresh invoice"
    if statement.moderation_required:
        return MODERATION
    return None


def page_may_be_paid(statement: Statement) -> bool:
    """Whether a page that nobody was given has been paid, or may be.

    A gateway may charge a known card as soon as the page is created. A payment in moderation
    continues when a person at the gateway releases it.
    """
    untouched = statement.status in UNSOLD_STATUSES | UNPAID_FINAL_STATUSES
    return statement.moderation_required or not untouched


def most_telling(matches: Sequence[Statement]) -> Statement:
    """Return the invoice that counts among several with one reference (newest last).

    A repeated create leaves several invoices, of which at most one was sold. The one that is
    nearest to a payment counts; among equals, the newest.
    """
    return max(enumerate(matches), key=lambda match: (_tells(match[1]), match[0]))[1]


def _tells(statement: Statement) -> int:
    status = statement.status
    if status in PAID_STATUSES:
        return 4
    refused = status in UNPAID_FINAL_STATUSES and refusal_of(statement) is not None
    if refused or status in DECLINED_STATUSES:
        return 2
    if status in UNSOLD_STATUSES:
        return 1
    return 0 if status in UNPAID_FINAL_STATUSES else 3  # in progress, or unclear
