"""What happens after an attempt ended without money: what, when, and which rule said so.

    scheduled charge ─▶ declined ─▶ step 1 ─▶ declined ─▶ step 2 … ─▶ declined ─▶ the policy's end
                                    └── a day after any attempt at the earliest, at the local hour

Only attempts of origin `dunning` use up steps: a manual retry, a pay link, a new or a backup card
neither shortens the ladder (https://github.com/polarsource/polar/issues/10811) nor moves a date
that is still ahead. Everything is a function of the policy and of the declines so far, so a
redelivered message cannot climb.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Attempt, Origin
from billing_worker.domain.calendar import local_hour_after
from billing_worker.domain.declines import Decline, DeclineClass, decline_for
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.timings import Timings

STEP_LATE_AFTER = timedelta(hours=1)
"""Sweeps run every few seconds: a step that was dated within the policy's age is made all the same."""

MAX_NOT_CHARGED_IN_A_ROW = 5
"""Five attempts whose sale certainly never left mean that none ever will: a person has to look."""

REST_DAYS = 1
"""Between two attempts on a card that refused, whoever asked for the first of them."""

CONFIGURATION_RETRY = timedelta(hours=1)
"""The service is paused by then; this is when the invoice is due again once it is resumed."""

LADDER_ORIGINS = frozenset({Origin.SCHEDULED, Origin.DUNNING})
ASKED_FOR = frozenset({Origin.MANUAL, Origin.NEW_CARD, Origin.LINK})
"""What a suspended subscription owes is charged when somebody asks for it, never by a clock."""


# --- policies -------------------------------------------------------------------------------


class End(StrEnum):
    """What becomes of the debt and the subscription when the ladder is used up."""

    SUSPEND = "suspend"  # Invoice uncollectible, nothing more becomes due; money brings it back.
    CANCEL = "cancel"  # Invoice uncollectible, subscription over for good.
    LEAVE_OPEN = "leave_open"  # Invoice stays open for a person, the subscription past due.


@dataclass(frozen=True, slots=True)
class Policy:
    """A recovery ladder. Days count from the ladder's previous attempt, never from the first.

    `max_attempts` counts the scheduled charge too; `max_age` counts from the first decline.
    """

    name: str
    delays_days: tuple[int, ...]
    source: str
    hour: int | None = 9  # on the customer's clock; None keeps the time of day
    max_attempts: int = 8
    max_age: timedelta = timedelta(days=30)
    end: End = End.SUSPEND

    @property
    def attempts(self) -> int:
        """The m of "attempt n of m": the scheduled charge and every step."""
        return min(self.max_attempts, len(self.delays_days) + 1)


POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("standard", (2, 5, 7, 7), "polarsource/polar server/polar/config.py:587-592"),
        Policy(
            "short",
            (3, 5, 7),
            "meteroid-oss/meteroid payment_transaction_failed.rs:24,130-155",
            end=End.LEAVE_OPEN,
        ),
        Policy("classic", (3, 5, 5), "flowglad billingRunHelpers.ts:1146-1179", end=End.CANCEL),
        Policy(
            "slow",
            (8, 8, 8),
            "killbill PaymentConfig.java:31-38",
            hour=None,
            end=End.LEAVE_OPEN,
        ),
    )
}
DEFAULT = POLICIES["standard"]
"""Polar's: it begins while most causes pass by themselves, is over before the next monthly bill, and
in `tests/benchmarks/recovery_table.py` recovers more than any ladder that begins as early.
"""


def policy_named(name: str | None) -> Policy:
    """The subscription's own policy. A name that is gone falls back: money must not stop for it."""
    return POLICIES.get(name or "", DEFAULT)


# --- what is decided ------------------------------------------------------------------------


class Turn(StrEnum):
    """Whose turn it is."""

    OURS = "retry"  # An attempt follows at `at`.
    CARD = "card_needed"  # The customer has to give another card.
    CUSTOMER = "customer_step_needed"  # The customer has to take part, with this card or another.
    PERSON = "person"  # Somebody of the merchant has to look.
    NOBODY = "end"  # The ladder is used up: the policy's end applies.


@dataclass(frozen=True, slots=True)
class NextStep:
    """`at` None means nothing happens by itself; `reason` then says whose turn it is."""

    at: datetime | None
    reason: str
    rule: str
    turn: Turn = Turn.PERSON
    origin: Origin | None = None  # of the attempt at `at`; None: the same as the one that ended
    gives_up_at: datetime | None = None  # how long a customer is waited for
    kills_card: bool = False
    pauses_service: bool = False


@dataclass(frozen=True, slots=True)
class Declined:
    """One declined attempt of an invoice."""

    origin: Origin
    at: datetime
    resolution: str | None


@dataclass(frozen=True, slots=True)
class _Situation:
    policy: Policy
    declines: Sequence[Declined]
    tz: str
    other_card: Origin | None
    never: str | None

    @property
    def kind(self) -> DeclineClass:
        return DeclineClass.HARD if self.never else self.row.kind

    @property
    def last(self) -> Declined:
        return self.declines[-1]

    @property
    def row(self) -> Decline:
        return decline_for(self.last.resolution)

    @property
    def reason(self) -> str:
        return f"declined_{self.row.kind}: {self.last.resolution or 'no resolution'}"

    def how_often(self, belongs: Callable[[Decline], bool]) -> int:
        """Among the ladder's own attempts: what somebody asked for between them is not a retry."""
        return sum(
            declined.origin in LADDER_ORIGINS and belongs(decline_for(declined.resolution))
            for declined in self.declines
        )

    def wait_for(self, turn: Turn, rule: str) -> NextStep:
        until = self.declines[0].at + self.policy.max_age
        return NextStep(None, self.reason, rule, turn, gives_up_at=until)


def after_decline(
    policy: Policy,
    declines: Sequence[Declined],
    tz: str,
    *,
    other_card: Origin | None = None,
    never: str | None = None,
) -> NextStep:
    """Decide what follows the last of an invoice's declines (oldest first, at least one).

    `tz` is the customer's zone. `other_card` says that another card could be charged now: the one
    that has replaced this one meanwhile (`new_card`), or one the customer agreed to (`backup`).
    `never` names the network rule, if any, by which the acquirer's code forbids the card for ever.
    """
    situation = _Situation(policy, declines, tz, other_card, never)
    step = _RULE_OF_CLASS[situation.kind](situation)
    if other_card is Origin.NEW_CARD and situation.kind in _ABOUT_THE_CARD:
        return replace(
            step, at=situation.last.at, turn=Turn.OURS, origin=other_card, rule="card.replaced",
            gives_up_at=None,
        )  # fmt: skip
    return step


def after_page_declined(
    policy: Policy,
    declines: Sequence[Declined],
    tz: str,
    *,
    other_card: Origin | None = None,
    never: str | None = None,
) -> NextStep | None:
    """What a decline on a page changes. None: what was planned before stands as it was.

    The arguments are those of `after_decline`. A page takes any card: only a network's code that
    says never is held against the card on file. Another hard decline just ends its automatic tries.
    """
    situation = _Situation(policy, declines, tz, other_card, never)
    if never is not None:
        return _after_hard(situation)
    if situation.kind is DeclineClass.HARD:
        return situation.wait_for(Turn.CARD, "link.hard_card_needed")
    if situation.kind is DeclineClass.UNKNOWN:
        return hold(situation.reason, "link.unknown_person")
    return None


_ABOUT_THE_CARD = frozenset({DeclineClass.SOFT, DeclineClass.HARD, DeclineClass.NEEDS_CUSTOMER})


def _after_soft(situation: _Situation) -> NextStep:
    if situation.row.once and situation.how_often(lambda row: row.once) > 1:
        return situation.wait_for(Turn.CARD, "soft.at_most_one_retry")
    return _climb(situation, "ladder.step")


def _after_hard(situation: _Situation) -> NextStep:
    if situation.other_card is Origin.BACKUP:
        at, rule = situation.last.at, situation.never or "hard.backup_card"
        step = NextStep(at, situation.reason, rule, Turn.OURS, Origin.BACKUP)
    else:
        step = situation.wait_for(Turn.CARD, situation.never or "hard.card_needed")
    return replace(step, kills_card=True)


def _after_customer(situation: _Situation) -> NextStep:
    return situation.wait_for(Turn.CUSTOMER, "needs_customer.step")


def _after_configuration(situation: _Situation) -> NextStep:
    """The same attempt again once the service is resumed; no step of the ladder is used up."""
    if not situation.row.pauses:
        return hold(situation.reason, "configuration.person")
    return NextStep(
        situation.last.at + CONFIGURATION_RETRY,
        situation.reason,
        "configuration.service_paused",
        Turn.OURS,
        situation.last.origin,
        pauses_service=True,
    )


def _after_technical(situation: _Situation) -> NextStep:
    if situation.how_often(lambda row: row.kind is DeclineClass.TECHNICAL) > 1:
        return hold(situation.reason, "technical.second_time")
    return _climb(situation, "technical.next_day", delay_days=1)


def _after_unknown(situation: _Situation) -> NextStep:
    return hold(situation.reason, "unknown.person")


_RULE_OF_CLASS: Mapping[DeclineClass, Callable[[_Situation], NextStep]] = {
    DeclineClass.SOFT: _after_soft,
    DeclineClass.HARD: _after_hard,
    DeclineClass.NEEDS_CUSTOMER: _after_customer,
    DeclineClass.CONFIGURATION: _after_configuration,
    DeclineClass.TECHNICAL: _after_technical,
    DeclineClass.UNKNOWN: _after_unknown,
}


def steps_used(declines: Sequence[Declined]) -> int:
    """A refusal of our configuration was no answer about the card: its step comes again."""
    return sum(
        declined.origin is Origin.DUNNING
        and decline_for(declined.resolution).kind is not DeclineClass.CONFIGURATION
        for declined in declines
    )


def after_not_charged(now: datetime, not_charged_in_a_row: int, timings: Timings) -> NextStep:
    """Nothing was ever sent, so a new attempt harms nobody; but not for ever."""
    if not_charged_in_a_row >= MAX_NOT_CHARGED_IN_A_ROW:
        return NextStep(None, "not_charged_repeatedly", "not_charged.limit")
    at = now + timings.not_charged_retry
    return NextStep(at, "not_charged", "not_charged.retry", Turn.OURS)


def after_expired(since: datetime, timings: Timings, *, again: bool) -> NextStep:
    """The sale may have arrived, and the gateway's invoice has `expired` at `since`: no proof that
    nothing was charged. One more attempt comes by itself, late; after that somebody decides.

    `again`: it is not the first such attempt of the invoice.
    """
    if again:
        return hold(invoices.EXPIRED_AGAIN, "expired.person")
    at = since + timings.expired_retry
    return NextStep(at, invoices.EXPIRED, "expired.retry", Turn.OURS)


def in_recovery_since(invoice: Invoice, tries: Sequence[Attempt]) -> datetime | None:
    """When the debt was first declined; if it never was, when its newest attempt ended."""
    if invoice.first_declined_at is not None:
        return invoice.first_declined_at
    return max((one.settled_at for one in tries if one.settled_at), default=None)


def comes_too_late(
    policy: Policy, invoice: Invoice, tries: Sequence[Attempt], now: datetime
) -> NextStep | None:
    """What becomes of a step that no clock may take any more: a pause, or a stop of the workers, has
    outlasted the recovery. None: the step may be taken. Nobody's order is ever too late here.
    """
    since = in_recovery_since(invoice, tries)
    over = since is not None and now - STEP_LATE_AFTER > since + policy.max_age
    if not over or invoice.next_origin in ASKED_FOR:
        return None
    reason = f"{invoices.RECOVERY_ENDED}{invoices.OVER_AGE} {policy.max_age.days} days"
    return hold(reason, "ladder.too_old")


def after_refusal(rule: str, reason: str, again_at: datetime | None) -> NextStep:
    """A rule forbade the attempt. It comes again when the rule allows it, or with another card."""
    turn = Turn.CARD if again_at is None else Turn.OURS
    return NextStep(again_at, reason, rule, turn)


def hold(reason: str, rule: str) -> NextStep:
    """Nothing may happen before a person has looked."""
    return NextStep(None, reason, rule)


def _climb(situation: _Situation, rule: str, *, delay_days: int | None = None) -> NextStep:
    """The next step of the ladder, on its own day or after `delay_days`, or the end."""
    policy, used = situation.policy, steps_used(situation.declines)
    if used + 1 >= policy.attempts:
        return NextStep(None, situation.reason, "ladder.used_up", Turn.NOBODY)
    at = _date_of_step(situation, delay_days or policy.delays_days[used])
    if at > situation.declines[0].at + policy.max_age:
        return NextStep(None, situation.reason, "ladder.too_old", Turn.NOBODY)
    return NextStep(at, situation.reason, f"{rule} {used + 1}", Turn.OURS, Origin.DUNNING)


def _date_of_step(situation: _Situation, delay_days: int) -> datetime:
    hour, tz = situation.policy.hour, situation.tz
    on_ladder = [one.at for one in situation.declines if one.origin in LADDER_ORIGINS]
    before = on_ladder[-1] if on_ladder else situation.declines[0].at
    planned = local_hour_after(before, delay_days, hour, tz)
    rested = local_hour_after(situation.last.at, REST_DAYS, hour, tz)
    return max(planned, rested)
