"""The scenarios of the fault matrix: every way for the gateway to be, every script of a card."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from datetime import timedelta
from typing import Any

from billing_worker.sandbox.gateway import Behaviour
from tests.faults.boundaries import (
    HORIZON,
    HOUR,
    MINUTE,
    QUICK_TERMS,
    Breaks,
    Dies,
    RefusesASale,
    Scenario,
    Sleeps,
)

DUPLICATES = ("accept_new", "return_existing", "409", "422", "429")

DIES = Dies()
DIES_WITH_THE_BROKER = Dies(with_the_broker=True)
BREAKS = Breaks()
LIES = RefusesASale()
NAPS = tuple(Sleeps(span) for span in (timedelta(seconds=6), 2 * MINUTE, 3 * HOUR))
"""Past the sale gate; past the lease; past the invoice's lifetime, the grace and the retry."""


def scenario(
    token: str,
    fates: str = "paid",
    debits: str = "1",
    *,
    name: str | None = None,
    late_money: bool = False,
    terms: Any = QUICK_TERMS,
    horizon: timedelta = HORIZON,
    **behaviour: Any,
) -> Scenario:
    """A gateway at its worst unless told otherwise: it charges twice if it is asked twice."""
    worst = {"second_sale": "charge", "lifetime_seconds": 600.0}
    duplicates = behaviour.get("duplicate_create", "accept_new")
    return Scenario(
        name or f"{token}, duplicates: {duplicates}",
        token,
        Behaviour(**(worst | behaviour)),
        frozenset(fates.split("|")),
        frozenset(map(int, debits.split("|"))),
        late_money,
        terms,
        horizon,
    )


MAIN = scenario("approved")

DUPLICATE_CREATES = tuple(
    scenario(token, duplicate_create=policy)
    for policy in DUPLICATES
    for token in ("approved", "create_answer_lost", "answer_lost_after", "approved_later")
)
"""How duplicates of a create are met, for creates and sales with and without an answer."""

SECOND_SALES = tuple(
    scenario("approved_later", name=f"approved_later, second sale: {policy}", second_sale=policy)
    for policy in ("refuse", "ignore")
)

ANSWERS = (
    scenario("error_500_after"),
    scenario("html_502_after"),
    scenario("never_answers_after"),
    scenario("create_error_500"),
    scenario("slow"),
)

FINALS = (
    scenario("decline_insufficient_funds", "person|dated", "0", horizon=2 * HOUR),
    scenario("flips_to_processed", late_money=True),
    scenario("late_after_expiry", name="late_after_expiry, within the grace", later_seconds=300),
    scenario(
        "late_after_expiry",
        name="late_after_expiry, after the grace and before the next attempt",
        late_money=True,
        later_seconds=900,
        terms=replace(QUICK_TERMS, expired_retry=60 * MINUTE),
    ),
    scenario("partially_processed", "unknown|dated", "0|1", horizon=8 * MINUTE),
    scenario("rejects_token", "person", "0", horizon=HOUR),
    scenario("moderation", "person", "0", horizon=2 * HOUR),
)

# Found again under another reference than it was asked for, it stays unknown: no list that holds
# foreign references is believed.
_FATE_OF_MISSTATED = defaultdict(lambda: "person", reference="person|dated")

MISSTATEMENTS = tuple(
    scenario(f"wrong_{field}", _FATE_OF_MISSTATED[field], "0", horizon=2 * HOUR)
    for field in ("amount", "currency", "payment_amount", "test_mode", "reference")
)

EXPIRIES = tuple(
    scenario(token, "person", "0")
    for token in ("answer_lost_before", "never_answers_before", "error_500_before",
                  "pending_forever", "needs_3ds")
)  # fmt: skip
"""Nothing ever reaches the card: two attempts, each to its expiry. Long runs."""

EVERYTHING = (
    *DUPLICATE_CREATES, *SECOND_SALES, *ANSWERS, *FINALS, *MISSTATEMENTS, *EXPIRIES
)  # fmt: skip
