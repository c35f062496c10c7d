"""The table of declines against the list that the gateway documents."""

from __future__ import annotations

from datetime import date

import pytest

from billing_worker.domain.declines import DECLINES, DeclineClass, classify, decline_for

# gateway.md §3.2, in its order, as read on 2026-11-22. A code that appears there belongs here too.
DOCUMENTED = tuple(
    """
    ok insufficient_funds limit_violation issuer_unavailable fatal_issuer_unavailable issuer_decline
    declined timeout fatal_timeout card_type_not_supported access_denied lost_or_stolen_card
    card_is_lost card_is_stolen card_restricted card_expired fatal_card_expired invalid_card
    fatal_invalid_card invalid_card_status invalid_pan fatal_decline card_verification_failed
    antifraud_error functionality_is_not_permitted invalid_cvv invalid_pin auth_3ds_required
    auth_otp_required card_is_3ds_enrolled invalid_3ds_code invalid_otp client_auth_failed
    auth_fatal_error unable_to_determine_3ds_enrolment card_is_not_3ds_enrolled invalid_credentials
    invalid_request invalid_details invalid_amount amount_conversion_error no_routes_by_condition
    duplicated_transaction unable_to_reconcile transaction_not_found error provider_error unknown
    fatal_error general_fatal_error provider_fatal_error
""".split()  # noqa: SIM905 - a list of 51 strings hides what is missing
)


@pytest.mark.parametrize("code", DOCUMENTED)
def test_every_documented_code_has_a_row_with_a_reason_a_source_and_a_date(code):
    row = DECLINES[code]
    assert row.reason
    assert row.seen
    assert row.read >= date(2026, 11, 22)


def test_no_row_is_about_a_code_that_nobody_documents():
    assert set(DECLINES) == set(DOCUMENTED)


@pytest.mark.parametrize("code", ["never_documented", "", None, "INSUFFICIENT_FUNDS", "51"])
def test_a_code_that_is_not_listed_is_unknown(code):
    assert classify(code) is DeclineClass.UNKNOWN


def test_only_soft_codes_are_limited_to_one_retry_and_only_configuration_pauses():
    assert {row.kind for row in DECLINES.values() if row.once} == {DeclineClass.SOFT}
    assert {row.kind for row in DECLINES.values() if row.pauses} == {DeclineClass.CONFIGURATION}


@pytest.mark.parametrize("code", ["card_is_not_3ds_enrolled", "invalid_amount", "invalid_details"])
def test_what_one_subscriber_can_cause_pauses_nobody_else(code):
    assert not decline_for(code).pauses
