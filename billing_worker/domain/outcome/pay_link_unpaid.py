"""Applies the unpaid end of a pay page."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from billing_worker.domain import card as cards
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.dunning import (
    NextStep,
    Turn,
    after_page_declined,
    policy_named,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.network_rules import never_again
from billing_worker.domain.outcome.attempt_changes import end_attempt, next_recheck
from billing_worker.domain.outcome.attempt_result import (
    Case,
    Conclusion,
    Context,
    NeverHandedOut,
)
from billing_worker.domain.outcome.distance import not_before
from billing_worker.domain.outcome.next_step import declines_of, stays_owed

LINK_NEVER_HANDED_OUT = "never handed out"


def link_unpaid(
    case: Case, status: AttemptStatus, outcome: str, context: Context, *, alert: bool = False
) -> Conclusion:
    """End the attempt of a pay page. An unpaid pay page is not a failed charge.

    The invoice keeps the next step that it had before the page, unless the page has shown that the
    stored card is dead, or the card was replaced meanwhile. The date of the step moves as long as
    the page may still turn out paid.
    """
    attempt = end_attempt(case.attempt, status, outcome, context)
    declined = status is AttemptStatus.DECLINED
    kind = EventKind.ATTEMPT_DECLINED if declined else EventKind.ATTEMPT_NOT_CHARGED
    said = context.event(kind, reason=outcome, alert=alert)
    refused = _after_refusal(case, attempt, context) if declined else None
    concluded = _freed(case, attempt, refused, said, context)
    dead = refused.reason if refused and refused.kills_card else None
    return replace(concluded, kills_card=dead)


def _after_refusal(case: Case, attempt: Attempt, context: Context) -> NextStep | None:
    never = None
    if attempt.card_id is not None:
        brand = case.card.brand if case.card else None
        never = never_again(brand, attempt.original_code, context.now)
    return after_page_declined(
        policy_named(case.subscription.dunning_policy),
        declines_of(case, attempt),
        case.subscription.schedule.tz,
        other_card=case.other_card,
        never=never.rule if never else None,
    )


def _freed(
    case: Case, attempt: Attempt, refused: NextStep | None, said: Event, context: Context
) -> Conclusion:
    """Free the invoice slot and set the next step."""
    invoice = case.invoice
    if invoice.status is not InvoiceStatus.OPEN:
        return Conclusion(replace(case, attempt=attempt), (said,))
    step = refused
    if (refused is None or refused.turn is Turn.CARD) and _replaced(case, attempt, context):
        step = NextStep(context.now, "card_replaced", "card.replaced", Turn.OURS, Origin.NEW_CARD)
    if step is None or _waits_for_a_person(invoice):
        return _as_it_was(case, attempt, said, context)
    if refused is not None and invoice.first_declined_at is None:
        invoice = replace(invoice, first_declined_at=context.now)
    # The step that a pause has kept no longer stands.
    planned = replace(case, invoice=replace(invoice, paused_attempt_at=None))
    return stays_owed(planned, attempt, step, (said,), context)


def _replaced(case: Case, attempt: Attempt, context: Context) -> bool:
    """Whether the customer has given another card while the page was open. It could not be charged
    at that time, because the page held the invoice slot.
    """
    invoice, card = case.invoice, case.default_card
    dated = invoice.next_attempt_at or invoice.paused_attempt_at
    in_ladder = invoice.first_declined_at is not None and dated is not None
    if not in_ladder and invoice.give_up_at is None:
        return False
    charged = [a for a in case.earlier if a.origin is not Origin.LINK]
    last = max(charged, key=lambda a: a.number).card_id if charged else None
    if card is None or card.id in {last, attempt.card_id}:
        return False
    return cards.obstacle(card, context.now) is None


def _waits_for_a_person(invoice: Invoice) -> bool:
    """Whether a person has to decide about the invoice. A pay page does not end that wait."""
    dated = invoice.next_attempt_at or invoice.paused_attempt_at
    return dated is None and invoice.give_up_at is None and invoice.reason is not None


def _as_it_was(case: Case, attempt: Attempt, said: Event, context: Context) -> Conclusion:
    invoice = case.invoice
    at = invoice.next_attempt_at
    ended = [attempt, *(one for one in case.earlier if one.id != attempt.id)]
    earliest = not_before(invoice.next_origin, ended, context.timings)
    if at is not None and earliest is not None:
        at = max(at, earliest)
    if at is None and invoice.reason is None:
        invoice = replace(invoice, reason="link_not_paid")
    freed = context.event(
        EventKind.INVOICE_WAITING,
        reason=invoice.reason,
        rule="link.unpaid",
        next_attempt_at=at,
    )
    invoice = replace(invoice, next_attempt_at=at, enqueue_at=at)
    return Conclusion(replace(case, attempt=attempt, invoice=invoice), (said, freed))


def never_handed_out(case: Case, news: NeverHandedOut, context: Context) -> Conclusion:
    """Handle an attempt for whose reference the gateway lists nothing.

    A prepared one ends once its lease has run out. It is polled again: a create may arrive late.
    """
    attempt = case.attempt
    if attempt.status is AttemptStatus.NOT_CHARGED and attempt.gateway_id is None:
        again = next_recheck(attempt.settled_at or attempt.created_at, context.now)
        asked = replace(case, attempt=replace(attempt, next_poll_at=again))
        return Conclusion(asked, _left_open(attempt, news, again, context))
    lapsed = attempt.lease_until is not None and attempt.lease_until <= context.now
    if attempt.status is not AttemptStatus.PREPARED or not lapsed:
        return Conclusion(case, ())
    return link_unpaid(case, AttemptStatus.NOT_CHARGED, LINK_NEVER_HANDED_OUT, context)


def _left_open(
    attempt: Attempt, news: NeverHandedOut, again: datetime | None, context: Context
) -> tuple[Event, ...]:
    """Tell of a withdrawn charge that may have been sold. After the last poll a person is alerted; a
    callback still has it polled.
    """
    if news.found is None:
        return ()
    polled = context.event(EventKind.ATTEMPT_POLLED, found=news.found)
    if again is not None:
        return (polled,)
    reason = f"{news.found}; it is not polled any more"
    left = context.event(
        EventKind.ATTEMPT_LEFT_TO_PERSON, alert=True, reason=reason, reference=attempt.reference_id
    )
    return (polled, left)
