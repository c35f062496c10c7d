"""What people and other services ask of a subscription.

    lock ─▶ open what is already due, on the old terms ─▶ decide (domain/lifecycle.py) ─▶ one event

Every function is one transaction and idempotent: asked again it answers `unchanged`. It raises
InvalidInput (field and reason) for what cannot be done, and then nothing has changed. `by` is who
decides, `why` the reason for the history. `decided_at` is when, if not now: the decision takes
effect as if it had been carried out then (see `services/invoicing/decided_at.py`).

No proration: a change never touches a period that has begun. Its invoice keeps its amount,
currency and description; nothing is refunded, credited or charged for the rest of it, and the next
period has the new terms in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain import invoice as invoices
from billing_worker.domain import lifecycle as rules
from billing_worker.domain.catch_up import MAX_PLANNED_PERIODS, is_due
from billing_worker.domain.catch_up_policy import Policy
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.outgoing import notice
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.persistence import claims, history, subscriptions
from billing_worker.persistence import invoices as invoice_rows
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store, Within
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.decided_at import Decided, TakenBack, decided_when, take_back
from billing_worker.services.invoicing.pause_collection import Moment
from billing_worker.services.invoicing.renew import open_planned, plans_for
from billing_worker.services.notices.gate import decide_again
from billing_worker.services.subscriptions import terms

_S = SubscriptionStatus
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state of the subscription now. `as_dict` is the answer to the command line and to
    callers.
    """

    reference_id: str
    outcome: str  # "changed" or "unchanged"
    status: str
    next_billing_at: datetime | None  # None: no period becomes due
    cancels_at: datetime | None
    details: Mapping[str, Any]  # JSON, as in the event
    decided_at: datetime  # needed to repeat the decision after a restore

    def as_dict(self) -> dict[str, Any]:
        shown = asdict(self)
        for name in ("next_billing_at", "cancels_at", "decided_at"):
            shown[name] = shown[name].isoformat() if shown[name] else None
        return shown


def change(
    store: Store,
    clock: Clock,
    reference_id: str,
    *,
    amount: str | None = None,
    currency: str | None = None,
    interval: str | None = None,
    interval_count: int | None = None,
    description: str | None = None,
    catch_up: str | None = None,
    notices: str | None = None,
    ends_at: str | None = None,
    amount_from: str | None = None,
    by: str,
    why: str | None = None,
    decided_at: datetime | None = None,
) -> Outcome:
    """Change the terms from the next period on. None leaves a term as it is.

    `amount` is decimal text in major units and needed with a new currency. With `amount_from`, an
    instant as for `ends_at`, it counts for periods that begin then or later; an empty one takes back
    what was so agreed for later, as another amount, currency or interval does. An empty
    `description` removes it. `catch_up` ("hold", "collect_all:3") takes effect now, and so does
    `notices` ("require:30", "tell"); an empty one leaves it to the settings. `ends_at` is an
    instant in ISO 8601 with its offset, from which on no period begins; an empty one removes it.
    Raises InvalidInput on the argument's own name, on `reference_id`, or on `status` if the
    subscription is over.
    """

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        money = terms.money(before.money, amount, currency)
        if amount_from is not None:
            given = (interval, interval_count, description, catch_up, notices, ends_at)
            if any(one is not None for one in given):
                raise InvalidInput("amount_from", "is of the amount alone: change the rest apart")
            after = terms.repriced(before, amount, money, amount_from, asked.now)
            said = terms.differences(before, after)
            asked.becomes(after, EventKind.SUBSCRIPTION_CHANGED, **said)
            return
        after = rules.changed(
            rules.at_its_price(before) if amount is not None else before,
            money=money,
            interval=terms.interval(before.schedule.interval, interval, interval_count),
            now=asked.now,
        )
        if after.schedule.interval != before.schedule.interval:
            asked.refuse_numbers_in_use()
        if ends_at is not None:
            after = rules.ending(after, terms.instant("ends_at", ends_at))
        if before.paused_at and after.paused_at != before.paused_at:
            # The pause begins again: so far it has cost the customer no time.
            pause_collection.wait_longer(asked.connection, before.id, asked.now - before.paused_at)
        after = replace(
            after,
            description=terms.description(before.description, description),
            catch_up=Policy.parse(catch_up) if catch_up is not None else before.catch_up,
            notices=notice.chosen(notices) if notices is not None else before.notices,
        )
        if after.notices != before.notices:
            waiting = claims.lock_open(asked.connection, before.id)
            decide_again(asked.connection, waiting, asked.moment.now)
        said = terms.differences(before, after)
        asked.becomes(after, EventKind.SUBSCRIPTION_CHANGED, **said)

    return _ask(store, clock, reference_id, by, why, decide, decided_at)


def reschedule(
    store: Store,
    clock: Clock,
    reference_id: str,
    *,
    days: int | None = None,
    billing_day: int | None = None,
    free_periods: int | None = None,
    by: str,
    why: str | None = None,
    decided_at: datetime | None = None,
) -> Outcome:
    """Move the next date: `days` later (goodwill), to the first `billing_day` of a month, or by
    `free_periods` that are not billed. One of the three. It never comes sooner than it was agreed.

    Asked again it moves again, except for `billing_day`: a command is carried out once by its key.
    Raises InvalidInput on the argument's name, `reference_id` or `status`.
    """
    given = [one for one in (days, billing_day, free_periods) if one is not None]
    if len(given) != 1:
        raise InvalidInput("days", "give one of days, billing_day and free_periods")

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        if days is not None:
            after = rules.postponed(before, days)
        elif billing_day is not None:
            after = rules.on_billing_day(before, billing_day)
        else:
            after = rules.freed(before, given[0])
        asked.becomes(
            after,
            EventKind.SUBSCRIPTION_CHANGED,
            next_period_began=before.start_of(before.next_period).isoformat(),
            next_period_begins=after.start_of(after.next_period).isoformat(),
            free_periods=list(range(before.next_period, after.next_period)),
        )

    return _ask(store, clock, reference_id, by, why, decide, decided_at)


def pause(
    store: Store,
    clock: Clock,
    reference_id: str,
    *,
    until: str | None = None,
    shift_anchor: bool = False,
    by: str,
    why: str | None = None,
    decided_at: datetime | None = None,
) -> Outcome:
    """Pause: no period becomes due and no charge is sent until `resume`. Open invoices wait."""

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        is_paused = before.status is _S.PAUSED
        after = before if is_paused else rules.paused(before, asked.now)
        if until is not None:
            after = _pausing(after, until, asked.now, shift=shift_anchor)
        resumes = {"resumes_at": after.resumes_at and after.resumes_at.isoformat()}
        asked.becomes(after, EventKind.SUBSCRIPTION_PAUSED, **(resumes if until else {}))
        if is_paused:
            return
        pause_collection.put_aside(asked.connection, asked.subscription.id, asked.moment)

    return _ask(store, clock, reference_id, by, why, decide, decided_at)


def _pausing(subscription: Subscription, until: str, now: datetime, *, shift: bool) -> Subscription:
    at = terms.instant("until", until)
    if at is None:
        return replace(subscription, resumes_at=None, resumes_shifted=False)
    return rules.pausing_until(subscription, at, now, shift=shift)


def resume(
    store: Store,
    clock: Clock,
    reference_id: str,
    *,
    shift_anchor: bool,
    by: str,
    why: str | None = None,
    decided_at: datetime | None = None,
) -> Outcome:
    """End a pause. Open invoices are collected again.

    With `shift_anchor` the next period begins later by the length of the pause. Without it the
    dates stay, and periods that fell into the pause are skipped (see `domain.lifecycle.resumed`).
    """

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        if before.status in {_S.TRIALING, _S.ACTIVE, _S.PAST_DUE}:
            return
        after, told = pause_collection.resume(
            asked.connection, before, asked.now, asked.moment, shift=shift_anchor
        )
        asked.becomes(after, EventKind.SUBSCRIPTION_RESUMED, **told)

    return _ask(store, clock, reference_id, by, why, decide, decided_at)


def cancel(
    store: Store,
    clock: Clock,
    reference_id: str,
    *,
    at_period_end: bool,
    void_open: bool = False,
    by: str,
    why: str | None = None,
    decided_at: datetime | None = None,
) -> Outcome:
    """Over: now, or when the next period would begin.

    When it takes effect, open invoices are void, except one whose charge is in flight: the
    gateway's word decides that one, and it is void if it ends unpaid. What is to be collected
    after the end calls for `end`. A paused or suspended subscription is cancelled at once. Until a
    cancellation at the period's end takes effect, what is open is still collected: `details` names it
    in `still_collected`, whenever it is asked.

    `void_open`: what is open is void now, whatever becomes of the subscription. That is how one that
    has ended, or a one-off charge, is cancelled: it is refused otherwise, on `status`, with what
    stays owed.
    """

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        if before.status is _S.ENDED:
            _call_off(asked, why, void_open=void_open)
            return
        if void_open and at_period_end:
            asked.also(_voided(asked, why))
        scheduled = before.cancels_at is not None and before.next_billing_at is not None
        if before.status is _S.CANCELLED:
            return
        if at_period_end and scheduled:
            asked.details = asked.details | _still_collected(asked)
            return
        at_once = not at_period_end or asked.in_pause
        after = rules.cancelled(before) if at_once else rules.cancelling(before)
        if after.status is not _S.CANCELLED:
            told = {**_takes_effect(after), **_still_collected(asked)}
            asked.becomes(after, EventKind.CANCELLATION_SCHEDULED, **told)
            return
        asked.name_debts_paid_since()
        voided = pause_collection.give_up(asked.connection, before.id, asked.moment)
        voided += asked.details.get("voided", 0)
        asked.becomes(after, EventKind.SUBSCRIPTION_CANCELLED, voided=voided)

    return _ask(store, clock, reference_id, by, why, decide, decided_at, is_last=True)


def _still_collected(asked: _Asked) -> dict[str, Any]:
    """Return what a cancellation at the period's end does not stop: retries go on until it takes
    effect.
    """
    items = claims.lock_open(asked.connection, asked.subscription.id)
    owed = [i.invoice for i in items if i.invoice.reason != invoices.VOID_IF_UNPAID]
    if not owed:
        return {}
    return {
        "still_collected": [invoice.reference_id for invoice in owed[:_NAMED]],
        "still_collected_count": len(owed),
        "to_void_them": "cancel at the period's end with void_open (--and-void)",
    }


def _call_off(asked: _Asked, why: str | None, *, void_open: bool) -> None:
    before = asked.subscription
    if not void_open:
        owed = [item.invoice for item in claims.lock_open(asked.connection, before.id)]
        raise InvalidInput("status", _still_owed(owed))
    voided = _voided(asked, why)
    asked.becomes(rules.called_off(before), EventKind.SUBSCRIPTION_CANCELLED, **voided)


def _still_owed(owed: Sequence[Invoice]) -> str:
    """Refuse a cancellation that would stop nothing, and say what stays owed."""
    if not owed:
        return "is ended"
    named = ", ".join(invoice.reference_id for invoice in owed[:_NAMED])
    more = f" and {len(owed) - _NAMED} more" if len(owed) > _NAMED else ""
    stay = f"{len(owed)} invoice{'s stay' if len(owed) > 1 else ' stays'} owed and collected"
    return f"is ended, and {stay}: {named}{more}. To void them, cancel with void_open (--and-void)"


_NAMED = 5


def _voided(asked: _Asked, why: str | None) -> dict[str, Any]:
    """Void open invoices. One with a charge in flight becomes void if the charge ends unpaid."""
    asked.name_debts_paid_since()
    reason = f"{invoices.VOIDED}{why or 'with the subscription'}"
    return pause_collection.void_what_is_open(
        asked.connection, asked.subscription.id, reason, asked.moment
    )


def uncancel(
    store: Store,
    clock: Clock,
    reference_id: str,
    *,
    by: str,
    why: str | None = None,
    decided_at: datetime | None = None,
) -> Outcome:
    """Withdraw a cancellation at the period's end, before it takes effect."""

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        after = rules.keeping(before)
        asked.becomes(after, EventKind.CANCELLATION_WITHDRAWN, **_takes_effect(before))

    return _ask(store, clock, reference_id, by, why, decide, decided_at)


def _takes_effect(subscription: Subscription) -> dict[str, Any]:
    at = subscription.cancels_at
    return {"takes_effect_at": at.isoformat() if at else None}


def forgive(
    store: Store, clock: Clock, reference_id: str, *, by: str, why: str | None = None
) -> Outcome:
    """Void what a suspended subscription owes, and bill it again from its next period.

    What is in flight is void as soon as it has ended unpaid. Periods that began while it was suspended
    are not billed. Raises InvalidInput on `status` when it is not suspended.
    """

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        after = rules.forgiven(before, asked.now)
        reason = f"{invoices.VOIDED}{why or 'forgiven'}"
        asked.also(
            pause_collection.void_what_is_owed(asked.connection, before.id, reason, asked.moment)
        )
        asked.becomes(after, EventKind.SUBSCRIPTION_FORGIVEN)

    return _ask(store, clock, reference_id, by, why, decide, None)


def end(
    store: Store,
    clock: Clock,
    reference_id: str,
    *,
    void_open: bool = False,
    by: str,
    why: str | None = None,
    decided_at: datetime | None = None,
) -> Outcome:
    """End: no further period begins. Open invoices are still owed and collected, unless
    `void_open`.

    Also for a subscription that was handed over while paused: its open invoices are collected
    again. The other book continues it all the same.
    """

    def decide(asked: _Asked) -> None:
        before = asked.subscription
        if void_open:
            asked.also(_voided(asked, why))
        if before.status is _S.ENDED:
            return
        waited = asked.now - before.paused_at if before.paused_at else timedelta(0)
        asked.becomes(rules.ended(before), EventKind.SUBSCRIPTION_ENDED)
        pause_collection.take_up_again(asked.connection, before.id, asked.moment, waited)

    return _ask(store, clock, reference_id, by, why, decide, decided_at, closes=True, is_last=True)


# --- how it is asked -------------------------------------------------------------------------


class _Asked:
    """One request: the locked subscription as of the decision, and its changes."""

    def __init__(
        self,
        connection: Connection,
        before: TakenBack,
        moment: Moment,
        decided: Decided,
        why: str | None,
    ) -> None:
        self.connection = connection
        self.subscription = before.subscription
        self.moment = moment
        self.details: dict[str, Any] = {}
        self.changed = False
        self._decided = decided
        self._charged = list(before.charged)
        self._why = why

    @property
    def now(self) -> datetime:
        """The time of the decision, from which it takes effect."""
        return self._decided.at

    @property
    def in_pause(self) -> bool:
        """Whether it was paused then: a paused subscription has no period's end to wait for."""
        return self._decided.in_pause

    def becomes(self, after: Subscription, kind: EventKind, **details: Any) -> None:
        """Write the change and its event, unless nothing changes."""
        before = self.subscription
        if after == before:
            return
        if self._decided.told_later:
            details["decided_at"] = self.now.isoformat()
        if self._charged:
            details["charged_since"] = self._charged
        details = self.details | details
        self.subscription, self.details, self.changed = after, details, True
        subscriptions.save(self.connection, before, after)
        said = self.moment.event(
            kind, why=self._why, before=str(before.status), after=str(after.status), **details
        )
        said = replace(said, alert=bool(self._charged))
        history.write(self.connection, [Entry(said, after.id)])

    def name_debts_paid_since(self) -> None:
        """Name what was owed at the decision, would be void by it, and was paid since."""
        if self._decided.told_later:
            paid = invoice_rows.paid_after(self.connection, self.subscription.id, self.now)
            self._charged += [name for name in paid if name not in self._charged]

    def refuse_numbers_in_use(self) -> None:
        """Refuse another interval where two or more periods were charged since the decision.

        The first of them stands for the first new period. The others would use up the numbers of later
        ones, which would never be charged: two months, for example, that of the whole second year.
        """
        if len(self._charged) > 1:
            reason = f"{len(self._charged)} periods of the old interval were charged since"
            raise InvalidInput("decided_at", f"{reason}: tell of it as of now")

    def also(self, details: Mapping[str, Any]) -> None:
        """Add what was done besides and is already written."""
        if details:
            self.details, self.changed = dict(details), True


class _NothingChanges(Exception):
    """Nothing changes: the periods that were taken back for the decision are restored."""


def _ask(
    store: Store,
    clock: Clock,
    reference_id: str,
    by: str,
    why: str | None,
    decide: Callable[[_Asked], None],
    decided_at: datetime | None,
    *,
    closes: bool = False,
    is_last: bool = False,
) -> Outcome:
    """Lock and prepare a request. `closes`: only open invoices remain, which stay here after a
    hand-over. `is_last`: no date of a period counts after it.
    """
    if not by:
        raise InvalidInput("by", "must name who decides")
    with store.transaction() as connection:
        subscription = subscriptions.lock(connection, reference_id)
        if subscription is None:
            raise InvalidInput("reference_id", f"no subscription {reference_id!r}")
        if subscription.handed_over_at is not None and not closes:
            since = subscription.handed_over_at.isoformat()
            reason = f"was handed over to another book at {since}: decide there"
            raise InvalidInput("status", reason)
        moment = Moment(clock.now(), by)  # Read only now: the lock may have been waited for.
        decided = decided_when(connection, subscription, decided_at, moment.now, is_last=is_last)
        asked = _Asked(connection, TakenBack(subscription), moment, decided, why)
        with suppress(_NothingChanges), Within(connection).transaction():
            before = take_back(connection, subscription, decided.at, moment)
            current = _up_to_date(connection, before.subscription, decided.at, moment)
            asked = _Asked(connection, replace(before, subscription=current), moment, decided, why)
            decide(asked)
            if before.subscription != subscription and not asked.changed:
                asked.subscription = subscription
                raise _NothingChanges
    after = asked.subscription
    for invoice in asked.details.get("charged_since", ()):
        log.error("billing.alert", kind="decision.charged_since", invoice=invoice)
    return Outcome(
        after.reference_id,
        "changed" if asked.changed else "unchanged",
        str(after.status),
        after.next_billing_at,
        after.cancels_at,
        asked.details,
        decided.at,
    )


def _up_to_date(
    connection: Connection, subscription: Subscription, at: datetime, moment: Moment
) -> Subscription:
    """End the pause whose date had come at the decision, and open the periods that were due, on the
    terms of that time: the sweep may be late.

    Opens as many as one transaction allows. A larger backlog is left to the sweep, which commits in
    between; then raises InvalidInput on `status`.
    """
    if rules.pause_is_over(subscription, at):
        subscription = pause_collection.end_at_its_date(connection, subscription, moment)
    if not is_due(subscription, at):
        return subscription
    plans = list(plans_for(connection, [subscription], at))
    if is_due(plans[0].after, at):
        most = f"more than {MAX_PLANNED_PERIODS} periods are due"
        raise InvalidInput("status", f"{most}: ask again when the sweep has opened them")
    open_planned(connection, plans, moment, enqueue_at=moment.now)
    return plans[0].after
