"""Classifies the gateway's resolution of a declined charge.

The provider publishes no classification. Every class here is our own reading of the names, by usual
card-scheme practice (gateway.md §3.2). Each row gives the meaning, the source and the day we read
it. Sources: T test-card table, R release notes with their version, S dashboard screenshot, M
resolutions page. A code that is not listed is `UNKNOWN`: no automatic charge; a person decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from enum import StrEnum


class DeclineClass(StrEnum):
    SOFT = "soft"  # May work on another day.
    HARD = "hard"  # Never again with this card.
    NEEDS_CUSTOMER = "needs_customer"  # The customer has to take part.
    CONFIGURATION = "configuration"  # Our fault or the merchant account's, not the card's.
    TECHNICAL = "technical"  # Ended without a reason about the card.
    UNKNOWN = "unknown"  # It may even have been paid: a person investigates.


@dataclass(frozen=True, slots=True)
class Decline:
    """What one resolution means for the next attempt, and the source for it."""

    kind: DeclineClass
    reason: str  # for a person
    seen: str
    read: date
    once: bool = False  # soft, but one retry at most: more retries do more harm than good
    pauses: bool = False  # every charge through this service would fail the same way


SOFT, HARD, CUSTOMER = DeclineClass.SOFT, DeclineClass.HARD, DeclineClass.NEEDS_CUSTOMER
CONFIG, TECHNICAL, UNKNOWN = (
    DeclineClass.CONFIGURATION,
    DeclineClass.TECHNICAL,
    DeclineClass.UNKNOWN,
)
FIRST = date(2026, 11, 22)  # the first reading of the sources

# A configuration row that one card, customer or amount can cause does not pause: a single
# subscriber must not be able to stop everybody else's charges.
DECLINES: Mapping[str, Decline] = {
    "ok": Decline(TECHNICAL, "no reason was given", "M", FIRST),
    "insufficient_funds": Decline(SOFT, "not enough money on the account", "T", FIRST),
    "limit_violation": Decline(SOFT, "a limit of the card is reached", "T", FIRST),
    "issuer_unavailable": Decline(SOFT, "the bank did not answer", "S", FIRST),
    # These three get one retry: the first may ask to block the card, the others give no reason.
    "fatal_issuer_unavailable": Decline(
        SOFT,
        "the bank did not answer and may want the card blocked",
        "R v1.23, S",
        FIRST,
        once=True,
    ),
    "issuer_decline": Decline(SOFT, 'the bank said "do not honour"', "T, S", FIRST, once=True),
    "declined": Decline(SOFT, "the bank gave no reason", "T", FIRST, once=True),
    "timeout": Decline(TECHNICAL, "the bank's answer was lost", "S", FIRST),
    "fatal_timeout": Decline(TECHNICAL, "the bank's answer was lost for good", "R v1.17", FIRST),
    "card_type_not_supported": Decline(HARD, "this kind of card is not accepted", "R v1.17", FIRST),
    "access_denied": Decline(
        CONFIG, "the route refuses the merchant", "T, R v1.17", FIRST, pauses=True
    ),
    "lost_or_stolen_card": Decline(HARD, "the card is reported lost or stolen", "T", FIRST),
    "card_is_lost": Decline(HARD, "the card is reported lost", "R v1.23", FIRST),
    "card_is_stolen": Decline(HARD, "the card is reported stolen", "R v1.23", FIRST),
    "card_restricted": Decline(HARD, "the bank has restricted the card", "R v1.23", FIRST),
    "card_expired": Decline(HARD, "the card has expired", "T", FIRST),
    "fatal_card_expired": Decline(HARD, "the card has expired", "R v1.23, S", FIRST),
    "invalid_card": Decline(HARD, "there is no such card", "T", FIRST),
    "fatal_invalid_card": Decline(HARD, "there is no such card", "R v1.23", FIRST),
    "invalid_card_status": Decline(HARD, "the card is not active", "T", FIRST),
    "invalid_pan": Decline(HARD, "the card number is wrong", "T", FIRST),
    "fatal_decline": Decline(
        HARD, "the acquirer demands that the card be blocked", "R v1.23", FIRST
    ),
    "card_verification_failed": Decline(
        HARD, "the platform has blocked the card", "R v1.22", FIRST
    ),
    "antifraud_error": Decline(HARD, "suspected fraud; repeating makes it worse", "T, M", FIRST),
    "functionality_is_not_permitted": Decline(HARD, "the card may not do this", "T", FIRST),
    "invalid_cvv": Decline(CUSTOMER, "the bank wants the security code", "T", FIRST),
    "invalid_pin": Decline(CUSTOMER, "the bank wants the PIN", "T", FIRST),
    "auth_3ds_required": Decline(CUSTOMER, "the bank wants 3-D Secure", "M", FIRST),
    "auth_otp_required": Decline(CUSTOMER, "the bank wants a one-time password", "M", FIRST),
    "card_is_3ds_enrolled": Decline(CUSTOMER, "the route refuses without 3-D Secure", "T", FIRST),
    "invalid_3ds_code": Decline(CUSTOMER, "3-D Secure failed", "T", FIRST),
    "invalid_otp": Decline(CUSTOMER, "the one-time password was wrong", "T", FIRST),
    "client_auth_failed": Decline(CUSTOMER, "the customer was not recognised", "T", FIRST),
    "auth_fatal_error": Decline(CUSTOMER, "3-D Secure failed", "T", FIRST),
    "unable_to_determine_3ds_enrolment": Decline(CUSTOMER, "3-D Secure failed", "T", FIRST),
    "card_is_not_3ds_enrolled": Decline(CONFIG, "the route demands 3-D Secure", "T", FIRST),
    "invalid_credentials": Decline(
        CONFIG, "the acquirer refuses our credentials", "T", FIRST, pauses=True
    ),
    "invalid_request": Decline(
        CONFIG, "the acquirer cannot read our request", "T", FIRST, pauses=True
    ),
    "invalid_details": Decline(CONFIG, "the order has wrong data", "T", FIRST),
    "invalid_amount": Decline(CONFIG, "the amount is not accepted", "T", FIRST),
    "amount_conversion_error": Decline(
        CONFIG, "the route cannot convert the currency", "M", FIRST, pauses=True
    ),
    "no_routes_by_condition": Decline(CONFIG, "no route accepts this card", "R v1.19", FIRST),
    # With an equal charge of ours at hand it is explained: see `dunning.EQUAL_WITHIN`.
    "duplicated_transaction": Decline(UNKNOWN, "an equal payment may have succeeded", "T", FIRST),
    "unable_to_reconcile": Decline(UNKNOWN, "the provider does not know the outcome", "T", FIRST),
    "transaction_not_found": Decline(UNKNOWN, "the provider does not know the outcome", "S", FIRST),
    "error": Decline(UNKNOWN, "no cause was given", "T", FIRST),
    "provider_error": Decline(UNKNOWN, "no cause was given", "T", FIRST),
    "unknown": Decline(UNKNOWN, "no cause was given", "T", FIRST),
    "fatal_error": Decline(TECHNICAL, "ended for a technical cause", "T", FIRST),
    "general_fatal_error": Decline(TECHNICAL, "ended for a technical cause", "T", FIRST),
    "provider_fatal_error": Decline(TECHNICAL, "ended for a technical cause", "T, S", FIRST),
}

DUPLICATED = "duplicated_transaction"

UNLISTED = Decline(UNKNOWN, "the code is in none of our sources", "-", FIRST)


def decline_for(resolution: str | None) -> Decline:
    return DECLINES.get(resolution or "", UNLISTED)


def classify(resolution: str | None) -> DeclineClass:
    return decline_for(resolution).kind
