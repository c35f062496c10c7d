"""Gateway resolution -> what kind of "no" it is.

The provider publishes no classification. Every class here is our own reading of the names,
by usual card-scheme practice (gateway.md §3.2, read 2026-11-22); the letter says where the
code was seen: T test-card table, R release notes, S dashboard screenshot, M resolutions page.
A code that is not listed is `UNKNOWN`: no automatic charge, a person looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class DeclineClass(StrEnum):
    SOFT = "soft"  # May work on another day.
    HARD = "hard"  # Never again with this card.
    NEEDS_CUSTOMER = "needs_customer"  # A person has to take part.
    CONFIGURATION = "configuration"  # Ours or the merchant account's fault, not the card's.
    TECHNICAL = "technical"  # Ended without a reason about the card.
    UNKNOWN = "unknown"  # May even have succeeded somewhere: investigate.


_C = DeclineClass
CLASSES: Mapping[str, DeclineClass] = {
    "ok": _C.TECHNICAL,  # M; on a failed invoice it is no reason at all
    "insufficient_funds": _C.SOFT,  # T
    "limit_violation": _C.SOFT,  # T
    "issuer_unavailable": _C.SOFT,  # S
    "fatal_issuer_unavailable": _C.SOFT,  # R v1.23, S; one bank demands a block: once only
    "issuer_decline": _C.SOFT,  # T, S; "do not honour"
    "declined": _C.SOFT,  # T
    "timeout": _C.TECHNICAL,  # S; the issuer's outcome was unknown
    "fatal_timeout": _C.TECHNICAL,  # R v1.17
    "card_type_not_supported": _C.HARD,  # R v1.17
    "access_denied": _C.CONFIGURATION,  # T, R v1.17
    "lost_or_stolen_card": _C.HARD,  # T
    "card_is_lost": _C.HARD,  # R v1.23
    "card_is_stolen": _C.HARD,  # R v1.23
    "card_restricted": _C.HARD,  # R v1.23
    "card_expired": _C.HARD,  # T
    "fatal_card_expired": _C.HARD,  # R, S
    "invalid_card": _C.HARD,  # T
    "fatal_invalid_card": _C.HARD,  # R
    "invalid_card_status": _C.HARD,  # T
    "invalid_pan": _C.HARD,  # T
    "fatal_decline": _C.HARD,  # R v1.23; the acquirer demands a block
    "card_verification_failed": _C.HARD,  # R v1.22; the platform's block list
    "antifraud_error": _C.HARD,  # T, M; repeating worsens the score
    "functionality_is_not_permitted": _C.HARD,  # T
    "invalid_cvv": _C.NEEDS_CUSTOMER,  # T; a card on file has none
    "invalid_pin": _C.NEEDS_CUSTOMER,  # T
    "auth_3ds_required": _C.NEEDS_CUSTOMER,  # M
    "auth_otp_required": _C.NEEDS_CUSTOMER,  # M
    "card_is_3ds_enrolled": _C.NEEDS_CUSTOMER,  # T
    "invalid_3ds_code": _C.NEEDS_CUSTOMER,  # T
    "invalid_otp": _C.NEEDS_CUSTOMER,  # T
    "client_auth_failed": _C.NEEDS_CUSTOMER,  # T
    "auth_fatal_error": _C.NEEDS_CUSTOMER,  # T
    "unable_to_determine_3ds_enrolment": _C.NEEDS_CUSTOMER,  # T
    "card_is_not_3ds_enrolled": _C.CONFIGURATION,  # T; the route demands 3-D Secure
    "invalid_credentials": _C.CONFIGURATION,  # T
    "invalid_request": _C.CONFIGURATION,  # T
    "invalid_details": _C.CONFIGURATION,  # T
    "invalid_amount": _C.CONFIGURATION,  # T
    "amount_conversion_error": _C.CONFIGURATION,  # M
    "no_routes_by_condition": _C.CONFIGURATION,  # R v1.19
    "duplicated_transaction": _C.UNKNOWN,  # T; an equal one may have succeeded
    "unable_to_reconcile": _C.UNKNOWN,  # T
    "transaction_not_found": _C.UNKNOWN,  # S
    "error": _C.UNKNOWN,  # T
    "provider_error": _C.UNKNOWN,  # T
    "unknown": _C.UNKNOWN,  # T
    "fatal_error": _C.TECHNICAL,  # T
    "general_fatal_error": _C.TECHNICAL,  # T
    "provider_fatal_error": _C.TECHNICAL,  # T, S
}


def classify(resolution: str | None) -> DeclineClass:
    return CLASSES.get(resolution or "", DeclineClass.UNKNOWN)
