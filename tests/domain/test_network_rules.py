"""The networks' limits, row by row, and the engine by its one sentence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_worker.domain.money import Money
from billing_worker.domain.network_rules import (
    LONGEST_COUNTED,
    RULES,
    Try,
    never_again,
    refusal,
)

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
PRICE = Money.parse("9.99", "USD")
OTHER = Money.parse("4.00", "USD")
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def tries(count, *, apart=DAY, money=PRICE, code=None, end=NOW):
    return [Try(end - (n + 1) * apart, money, code) for n in range(count)]


def rule(brand, made, money=PRICE, now=NOW):
    refused = refusal(brand, money, made, now)
    return refused and refused.rule


def test_every_row_has_a_source_and_a_date():
    assert all(row.source and row.since for row in RULES)
    assert len({row.name for row in RULES}) == len(RULES)


def test_a_card_without_declines_may_be_charged_whatever_its_brand():
    for brand in ("visa", "mastercard", "amex", None):
        assert rule(brand, []) is None


def test_visa_allows_20_reattempts_in_30_days_and_15_before_25_may_2025():
    assert rule("visa", tries(20)) is None
    assert rule("visa", tries(21)) == "visa.20_reattempts_in_30_days"
    old = datetime(2025, 5, 24, 12, 0, tzinfo=UTC)
    assert rule("visa", tries(15, end=old), now=old) is None
    assert rule("visa", tries(16, end=old), now=old) == "visa.15_reattempts_in_30_days"
    new = old + DAY
    assert rule("visa", tries(16, end=new), now=new) is None


def test_a_try_of_another_charge_is_no_reattempt_for_visa_and_counts_for_mastercard():
    thirty = [Try(NOW - DAY - n * HOUR, PRICE, charge=n) for n in range(40)]
    assert refusal("visa", PRICE, thirty, NOW, charge=99) is None
    assert refusal("visa", PRICE, thirty, NOW, charge=1) is None
    counted = refusal("mastercard", PRICE, thirty, NOW, charge=99)
    assert counted.rule == "mastercard.35_declines_in_30_days"


def test_mastercard_allows_10_declines_in_24_hours_of_any_amount():
    assert rule("mastercard", tries(9, apart=HOUR)) is None
    mixed = [*tries(5, apart=HOUR), *tries(5, apart=2 * HOUR, money=OTHER)]
    assert rule("mastercard", mixed) == "mastercard.10_declines_in_24_hours"


def test_mastercard_allows_35_declines_of_one_amount_in_30_days():
    assert rule("mastercard", tries(34, apart=20 * HOUR)) is None
    assert rule("mastercard", tries(35, apart=20 * HOUR)) == "mastercard.35_declines_in_30_days"
    assert rule("mastercard", tries(35, apart=20 * HOUR, money=OTHER)) is None


@pytest.mark.parametrize("code", ["04", "07", "14", "41", "43", "57", "R0", "R1", "R3"])
def test_a_visa_code_of_category_1_is_never_tried_again_at_any_age(code):
    made = tries(1, apart=4000 * DAY, code=code)
    refused = refusal("visa", PRICE, made, NOW)
    assert (refused.rule, refused.until) == ("visa.category_1_never", None)
    assert never_again("visa", code, NOW).rule == "visa.category_1_never"
    assert rule("mastercard", made) is None


@pytest.mark.parametrize("code", ["MAC 03", "mac:21", "59.03", "05.21"])
def test_mastercards_advice_03_and_21_are_never_tried_again(code):
    assert rule("mastercard", tries(1, code=code)) == "mastercard.advice_never"
    assert never_again("mastercard", code, NOW) is not None


@pytest.mark.parametrize(("code", "wait"), [("24", HOUR), ("25", DAY), ("26", 2 * DAY),
    ("27", 4 * DAY), ("28", 6 * DAY), ("29", 8 * DAY), ("30", 10 * DAY)])  # fmt: skip
def test_mastercards_advice_24_to_30_waits_as_coded(code, wait):
    made = [Try(NOW, PRICE, f"MAC {code}")]
    early = refusal("mastercard", PRICE, made, NOW + wait - timedelta(seconds=1))
    assert early.until == NOW + wait
    assert rule("mastercard", made, now=NOW + wait) is None


@pytest.mark.parametrize("code", ["insufficient_funds", "03", "3", "MAC", "", "051", "MAC 031"])
def test_what_is_not_named_as_an_advice_code_is_none(code):
    assert rule("mastercard", tries(1, code=code)) is None


def test_a_card_of_unknown_brand_obeys_the_rules_of_all_networks():
    assert rule(None, tries(10, apart=HOUR)) == "mastercard.10_declines_in_24_hours"
    assert rule("", tries(1, code="43")) == "visa.category_1_never"


@pytest.mark.parametrize(
    "brand", ["unknown", "other", "mc", "MC", "master", "electron", "eurocard"]
)
def test_a_brand_that_nobody_listed_obeys_the_rules_of_all_networks(brand):
    assert rule(brand, tries(10, apart=HOUR)) == "mastercard.10_declines_in_24_hours"
    assert rule(brand, tries(21)) == "visa.20_reattempts_in_30_days"
    assert never_again(brand, "43", NOW).rule == "visa.category_1_never"


@pytest.mark.parametrize("brand", ["amex", "American Express", "Mir", "UNION_PAY", "Diners Club"])
def test_other_networks_have_no_rows(brand):
    assert rule(brand, tries(60, apart=HOUR)) is None


@pytest.mark.parametrize("brand", ["VISA", "Visa Electron", "visa"])
def test_brands_are_recognised_however_they_are_spelt(brand):
    assert rule(brand, tries(21)) == "visa.20_reattempts_in_30_days"


def test_what_only_open_attempts_forbid_is_asked_again_within_the_hour():
    settled = tries(5, apart=HOUR)
    under_way = [Try(NOW, PRICE, open=True)] * 5
    refused = refusal("mastercard", PRICE, [*settled, *under_way], NOW)
    assert refused.rule == "mastercard.10_declines_in_24_hours"
    assert refused.until == NOW + HOUR
    forbidden_anyway = refusal("mastercard", PRICE, [*tries(10, apart=HOUR), *under_way], NOW)
    assert forbidden_anyway.until > NOW + HOUR


def test_nothing_older_than_the_longest_window_counts():
    """The proof that a card without a recent decline needs no count when an attempt is armed."""
    windows = [row.window for row in RULES if row.window is not None]
    assert max(windows) <= LONGEST_COUNTED
    ancient = [Try(NOW - LONGEST_COUNTED, PRICE, "MAC 30") for _ in range(100)]
    assert rule(None, ancient) is None


BRANDS = st.sampled_from(["visa", "mastercard", None])
TRIES = st.lists(
    st.builds(
        Try,
        st.integers(0, 40 * 24).map(lambda hours: NOW - timedelta(hours=hours)),
        st.sampled_from([PRICE, OTHER]),
        st.sampled_from([None, "51", "MAC 27"]),
    ),
    max_size=60,
)


@given(BRANDS, TRIES)
def test_a_refusal_ends_exactly_when_it_says(brand, made):
    refused = refusal(brand, PRICE, made, NOW)
    if refused is None:
        return
    assert refused.until > NOW
    just_before = refusal(brand, PRICE, made, refused.until - timedelta(seconds=1))
    assert just_before is not None
    assert refusal(brand, PRICE, made, refused.until) is None


@given(BRANDS, TRIES, TRIES)
def test_more_declines_never_allow_what_fewer_forbade(brand, made, more):
    if refusal(brand, PRICE, made, NOW) is not None:
        assert refusal(brand, PRICE, [*made, *more], NOW) is not None
