"""Decides what follows an attempt that ended without a payment: the step, its date and its rule.

    scheduled charge ─▶ declined ─▶ step 1 ─▶ declined ─▶ step 2 … ─▶ declined ─▶ the policy's end
                                    └── at the local hour, a day or more after any attempt

The *ladder* is the policy's sequence of retries. Only attempts of origin `dunning` use up steps. A
manual retry, a pay link, a new or a backup card neither shortens the ladder
(https://github.com/polarsource/polar/issues/10811) nor moves a date more than a day ahead. The
result depends only on the policy and the declines so far: a repeated message cannot skip a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Attempt, Origin
from billing_worker.domain.calendar import local_hour_after
from billing_worker.domain.declines import DUPLICATED, Decline, DeclineClass, decline_for
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.timings import Timings

STEP_LATE_AFTER = timedelta(hours=1)
"""How long after the policy's `max_age` a step is still made: sweeps may start it a little late."""

MAX_NOT_CHARGED_IN_A_ROW = 5
"""After so many attempts whose sale was certainly not sent, a person has to decide."""

REST_DAYS = 1
"""Days between any attempt on a declined card and the next step of the ladder."""

CONFIGURATION_RETRY = timedelta(hours=1)
"""Wait after a configuration decline. The gateway service is paused then: the attempt is repeated
after this time, but not before the service is resumed.
"""

EQUAL_WITHIN = timedelta(days=1)
"""How long before an attempt another charge of the same card and amount explains that the acquirer
calls it a duplicate. Acquirers compare within minutes to a day."""

LADDER_ORIGINS = frozenset({Origin.SCHEDULED, Origin.DUNNING})
ASKED_FOR = frozenset({Origin.MANUAL, Origin.NEW_CARD, Origin.LINK})
"""Origins of attempts on request. Only these charge what a suspended subscription still owes."""


# --- policies -------------------------------------------------------------------------------


class End(StrEnum):
    """What happens to invoice and subscription when the ladder is used up."""

    SUSPEND = "suspend"  # Invoice uncollectible; no period becomes due before a payment.
    CANCEL = "cancel"  # Invoice uncollectible, subscription cancelled.
    LEAVE_OPEN = "leave_open"  # Invoice open for a person to decide, subscription past due.


@dataclass(frozen=True, slots=True)
class Policy:
    """A ladder of retries. Each delay counts from the ladder's previous attempt.

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
        """The m of "attempt n of m": the scheduled charge and all steps."""
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
"""Polar's schedule. It begins early, when most causes pass without help, and ends before the next
monthly charge. In `tests/benchmarks/recovery_table.py` it recovers more than any other that begins
as early.
"""


def policy_named(name: str | None) -> Policy:
    """Return the policy of that name; DEFAULT for None and for a name that no longer exists."""
    return POLICIES.get(name or "", DEFAULT)


# --- what is decided ------------------------------------------------------------------------


class Turn(StrEnum):
    """Who has to act next."""

    OURS = "retry"  # The worker: an attempt follows at `at`.
    CARD = "card_needed"  # The customer has to give another card.
    CUSTOMER = "customer_step_needed"  # The customer has to take part, with this card or another.
    PERSON = "person"  # A person at the merchant has to decide.
    NOBODY = "end"  # The ladder is used up: the policy's end applies.


@dataclass(frozen=True, slots=True)
class NextStep:
    """What follows an attempt. `at` None: nothing happens automatically, and `turn` has to act."""

    at: datetime | None
    reason: str
    rule: str
    turn: Turn = Turn.PERSON
    origin: Origin | None = None  # of the attempt at `at`; None: the same as the one that ended
    gives_up_at: datetime | None = None  # until when to wait for the customer
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
    is_explained: bool = False

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
        """Count such declines of the ladder's own attempts. Attempts on request do not count."""
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
    equal_charge: str | None = None,
) -> NextStep:
    """Decide what follows the last of an invoice's declines (oldest first, at least one).

    `tz` is the customer's zone. `other_card`: another card could be charged now, either the new
    default card (`new_card`) or one with the customer's consent (`backup`). `never`: the network
    rule, if any, by which the acquirer's code forbids the card for ever.
    `equal_charge` names another charge of the card that explains a `duplicated_transaction`.
    """
    explained = equal_charge is not None
    situation = _Situation(policy, declines, tz, other_card, never, explained)
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
    """Decide what a decline on a pay page changes. None: the planned step stays.

    The arguments are those of `after_decline`. The customer may use any card on a page. So only a
    network's "never" code marks the stored card as dead; another hard decline merely ends its
    automatic attempts.
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
    """Repeat the attempt once the service is resumed. No step of the ladder is used up."""
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
    """A duplicate of another charge is tried on the next day. Only the bank's own refusals, or such
    duplicates, may have come before: of anything else an earlier attempt may be the one that succeeded.
    """
    refused = (decline_for(one.resolution).kind is DeclineClass.SOFT
               or one.resolution == DUPLICATED for one in situation.declines)  # fmt: skip
    if situation.last.resolution == DUPLICATED and situation.is_explained and all(refused):
        return _climb(situation, "duplicate.next_day", delay_days=1)
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
    """Count the used steps. A configuration decline says nothing about the card and uses none."""
    return sum(
        declined.origin is Origin.DUNNING
        and decline_for(declined.resolution).kind is not DeclineClass.CONFIGURATION
        for declined in declines
    )


def after_not_charged(now: datetime, not_charged_in_a_row: int, timings: Timings) -> NextStep:
    """Decide what follows when no sale was sent: a new attempt, up to a limit in a row."""
    if not_charged_in_a_row >= MAX_NOT_CHARGED_IN_A_ROW:
        return NextStep(None, "not_charged_repeatedly", "not_charged.limit")
    at = now + timings.not_charged_retry
    return NextStep(at, "not_charged", "not_charged.retry", Turn.OURS)


def after_expired(since: datetime, timings: Timings, *, again: bool) -> NextStep:
    """Decide what follows when a sale may have arrived and the gateway's invoice has expired.

    That is no proof that nothing was charged. One more attempt follows automatically,
    `timings.expired_retry` after `since`, the time of the gateway's `expired`. `again`: the invoice
    has had such an attempt before; a person decides.
    """
    if again:
        return hold(invoices.EXPIRED_AGAIN, "expired.person")
    at = since + timings.expired_retry
    return NextStep(at, invoices.EXPIRED_UNPROVEN, "expired.retry", Turn.OURS)


def in_recovery_since(invoice: Invoice, tries: Sequence[Attempt]) -> datetime | None:
    """Return when the invoice was first declined, or else when its newest attempt ended."""
    if invoice.first_declined_at is not None:
        return invoice.first_declined_at
    return max((one.settled_at for one in tries if one.settled_at), default=None)


def comes_too_late(
    policy: Policy, invoice: Invoice, tries: Sequence[Attempt], now: datetime
) -> NextStep | None:
    """Decide what follows when a step is older than the policy allows; None: it may be made.

    A pause, or stopped workers, can delay a step that long. Attempts on request are never too late.
    """
    since = in_recovery_since(invoice, tries)
    over = since is not None and now - STEP_LATE_AFTER > since + policy.max_age
    if not over or invoice.next_origin in ASKED_FOR:
        return None
    reason = f"{invoices.RECOVERY_ENDED}{invoices.OVER_AGE} {policy.max_age.days} days"
    return hold(reason, "ladder.too_old")


def after_refusal(rule: str, reason: str, again_at: datetime | None) -> NextStep:
    """Decide what follows a forbidden attempt: a retry at `again_at`; None: another card."""
    turn = Turn.CARD if again_at is None else Turn.OURS
    return NextStep(again_at, reason, rule, turn)


def hold(reason: str, rule: str) -> NextStep:
    """Wait for a person's decision."""
    return NextStep(None, reason, rule)


def _climb(situation: _Situation, rule: str, *, delay_days: int | None = None) -> NextStep:
    """Return the next step of the ladder, or its end. `delay_days` replaces the policy's delay."""
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
