"""Card tokens that script what happens to their invoices.

A token reads `<outcome>` or `<outcome>.<anything>`, for instance `approved.17`. Nothing is random,
so a run can be repeated byte by byte. This table exists because the provider's own test mode
creates no token that fails (gateway.md §7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Literal


class Creation(Enum):
    """What happens to the create request."""

    NORMAL = auto()
    ANSWER_LOST = auto()
    """The invoice is created, but the connection closes before an answer; once per reference_id."""
    ERROR_500 = auto()
    """Nothing is created; once per reference_id."""
    TOKEN_REJECTED = auto()


class Ending(Enum):
    """What the sale does to the customer's money."""

    CHARGED = auto()
    CHARGED_IN_PART = auto()
    CHARGED_LATER = auto()
    CHARGED_AFTER_EXPIRY = auto()
    DECLINED = auto()
    DECLINED_THEN_CHARGED = auto()
    UNDECIDED = auto()
    """The gateway has accepted the sale and never states how it ended."""
    NOT_RECEIVED = auto()
    """The gateway never receives the sale, whatever the client gets as an answer."""


class SaleAnswer(Enum):
    """What the client receives as the answer to its sale."""

    STATUS = auto()
    ASKS_FOR_3DS = auto()
    SILENCE = auto()
    HANG_UP = auto()
    ERROR_500 = auto()
    HTML_502 = auto()


Misstatement = Literal["amount", "currency", "payment_amount", "test_mode", "reference_id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row of the table: the first word of a token, and what it makes happen."""

    name: str
    meaning: str
    creation: Creation = Creation.NORMAL
    ending: Ending = Ending.CHARGED
    resolution: str = "ok"
    answer: SaleAnswer = SaleAnswer.STATUS
    misstates: Misstatement | None = None
    moderated: bool = False
    slow: bool = False
    later_seconds: int | None = None
    """What "later" means for this token. None: `Behaviour.later_seconds`."""
    expires_with: str = "ok"
    """Resolution of an invoice that expires after its sale."""


_HOUR: Final = 3600

_SCRIPTED: Final = (
    Outcome(name="approved", meaning="charged at once"),
    Outcome(
        name="approved_later",
        meaning="pending, charged later_seconds after the sale",
        ending=Ending.CHARGED_LATER,
    ),
    Outcome(
        name="pending_forever",
        meaning="pending until the invoice expires, never charged",
        ending=Ending.UNDECIDED,
    ),
    Outcome(
        name="needs_3ds",
        meaning="asks for the customer (auth_payload), then pending until the invoice expires",
        ending=Ending.UNDECIDED,
        # A card that waits for 3-D Secure stays pending with this resolution (§3.2, §7).
        resolution="auth_3ds_required",
        answer=SaleAnswer.ASKS_FOR_3DS,
    ),
    Outcome(
        name="never_answers_before",
        meaning="the sale is never answered and not charged",
        ending=Ending.NOT_RECEIVED,
        answer=SaleAnswer.SILENCE,
    ),
    Outcome(
        name="never_answers_after",
        meaning="the sale is charged and never answered",
        answer=SaleAnswer.SILENCE,
    ),
    Outcome(
        name="answer_lost_before",
        meaning="the connection closes on the sale, not charged",
        ending=Ending.NOT_RECEIVED,
        answer=SaleAnswer.HANG_UP,
    ),
    Outcome(
        name="answer_lost_after",
        meaning="charged, then the connection closes without an answer",
        answer=SaleAnswer.HANG_UP,
    ),
    Outcome(
        name="error_500_before",
        meaning="the sale answers 500, not charged",
        ending=Ending.NOT_RECEIVED,
        answer=SaleAnswer.ERROR_500,
    ),
    Outcome(
        name="error_500_after",
        meaning="charged, then the sale answers 500",
        answer=SaleAnswer.ERROR_500,
    ),
    Outcome(
        name="html_502_after",
        meaning="charged, then a proxy answers 502 with a web page",
        answer=SaleAnswer.HTML_502,
    ),
    Outcome(
        name="create_answer_lost",
        meaning="the first create of a reference_id makes the invoice, then the connection closes;"
        " charged at once when sold",
        creation=Creation.ANSWER_LOST,
    ),
    Outcome(
        name="create_error_500",
        meaning="the first create of a reference_id answers 500 and makes nothing;"
        " charged at once when sold",
        creation=Creation.ERROR_500,
    ),
    Outcome(
        name="rejects_token",
        meaning="the create answers 422: the token is unknown",
        creation=Creation.TOKEN_REJECTED,
    ),
    Outcome(
        name="wrong_amount",
        meaning="the invoice is made for one unit more than ordered, and charged so if sold",
        misstates="amount",
    ),
    Outcome(
        name="wrong_currency",
        meaning="the invoice is made in another currency, and charged so if sold",
        misstates="currency",
    ),
    Outcome(
        name="wrong_payment_amount",
        meaning="a fee of one unit is added on top of the amount, and charged if sold",
        misstates="payment_amount",
    ),
    Outcome(
        name="wrong_test_mode",
        meaning="the invoice is live where test was ordered, or the other way round",
        misstates="test_mode",
    ),
    Outcome(
        name="wrong_reference",
        meaning="the invoice carries another reference_id than the order",
        misstates="reference_id",
    ),
    Outcome(
        name="partially_processed",
        meaning="half of the amount is charged",
        ending=Ending.CHARGED_IN_PART,
    ),
    Outcome(
        name="flips_to_processed",
        meaning="declined (insufficient_funds), yet charged later_seconds after the sale",
        ending=Ending.DECLINED_THEN_CHARGED,
        resolution="insufficient_funds",
    ),
    Outcome(
        name="late_after_expiry",
        meaning="pending until the invoice expires, yet charged later_seconds after that",
        ending=Ending.CHARGED_AFTER_EXPIRY,
    ),
    *(
        Outcome(
            name=f"late_{hours}h_after_expiry",
            meaning=f"pending until the invoice expires, yet charged {hours} hours after that",
            ending=Ending.CHARGED_AFTER_EXPIRY,
            later_seconds=hours * _HOUR,
        )
        for hours in (6, 16, 80)
    ),
    Outcome(
        name="flips_after_5m",
        meaning="declined (insufficient_funds), yet charged five minutes after the sale",
        ending=Ending.DECLINED_THEN_CHARGED,
        resolution="insufficient_funds",
        later_seconds=300,
    ),
    Outcome(
        name="flips_after_2h",
        meaning="declined (insufficient_funds), yet charged two hours after the sale",
        ending=Ending.DECLINED_THEN_CHARGED,
        resolution="insufficient_funds",
        later_seconds=2 * _HOUR,
    ),
    *(
        Outcome(
            name=f"expires_{resolution}",
            meaning=f"pending until the invoice expires with resolution {resolution}, never charged",
            ending=Ending.UNDECIDED,
            expires_with=resolution,
        )
        for resolution in ("insufficient_funds", "card_is_stolen", "auth_3ds_required")
    ),
    Outcome(
        name="moderation",
        meaning="blocked for manual moderation, pending until the invoice expires",
        ending=Ending.UNDECIDED,
        moderated=True,
    ),
    Outcome(name="slow", meaning="charged at once, answered after slow_seconds", slow=True),
)

# Every resolution of gateway.md §3.2, in its order.
RESOLUTIONS: Final = (
    "ok",
    "insufficient_funds",
    "limit_violation",
    "issuer_unavailable",
    "fatal_issuer_unavailable",
    "issuer_decline",
    "declined",
    "timeout",
    "fatal_timeout",
    "card_type_not_supported",
    "access_denied",
    "lost_or_stolen_card",
    "card_is_lost",
    "card_is_stolen",
    "card_restricted",
    "card_expired",
    "fatal_card_expired",
    "invalid_card",
    "fatal_invalid_card",
    "invalid_card_status",
    "invalid_pan",
    "fatal_decline",
    "card_verification_failed",
    "antifraud_error",
    "functionality_is_not_permitted",
    "invalid_cvv",
    "invalid_pin",
    "auth_3ds_required",
    "auth_otp_required",
    "card_is_3ds_enrolled",
    "invalid_3ds_code",
    "invalid_otp",
    "client_auth_failed",
    "auth_fatal_error",
    "unable_to_determine_3ds_enrolment",
    "card_is_not_3ds_enrolled",
    "invalid_credentials",
    "invalid_request",
    "invalid_details",
    "invalid_amount",
    "amount_conversion_error",
    "no_routes_by_condition",
    "duplicated_transaction",
    "unable_to_reconcile",
    "transaction_not_found",
    "error",
    "provider_error",
    "unknown",
    "fatal_error",
    "general_fatal_error",
    "provider_fatal_error",
)

# The gateway's list is open (§3.2, "anything else"): this one stands for every future resolution.
_INVENTED_RESOLUTION = "never_documented"


def _decline(resolution: str) -> Outcome:
    return Outcome(
        name=f"decline_{resolution}",
        meaning=f"process_failed for good, resolution {resolution}",
        ending=Ending.DECLINED,
        resolution=resolution,
    )


OUTCOMES: Final[Mapping[str, Outcome]] = {
    outcome.name: outcome
    for outcome in (*_SCRIPTED, *map(_decline, (*RESOLUTIONS, _INVENTED_RESOLUTION)))
}


def outcome_of(token: str) -> Outcome | None:
    """Return the outcome that a card token scripts, or None for a token outside of the table."""
    return OUTCOMES.get(token.partition(".")[0])


def token_table() -> Iterator[tuple[str, str]]:
    """Yield (token, meaning) for `--help` and docs/sandbox.md."""
    return ((outcome.name, outcome.meaning) for outcome in OUTCOMES.values())
