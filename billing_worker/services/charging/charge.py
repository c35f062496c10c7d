"""One charge, from a claimed invoice to an answer. Only this module may send a sale.

    claim -> create or find -> compare -> commit `submitted` -> SALE, once -> look -> settle

Wherever the process dies, the row says what may have happened: before `submitted` nothing was
sold, after it only the gateway knows. See docs/operations.md, "What if it dies here?".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import structlog

from billing_worker.domain.errors import (
    ConcurrentChange,
    GatewayError,
    NotSent,
    OutcomeUnknown,
    Refused,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import GATEWAY_REFUSED, LATE_MONEY, LATE_MONEY_WAITS
from billing_worker.domain.outcome import (
    Forbidden,
    News,
    NoAnswer,
    NothingSent,
    Postponed,
    Stated,
)
from billing_worker.domain.statement import (
    DECLINED_STATUSES,
    NO_BEARER,
    PAID_STATUSES,
    UNSOLD_STATUSES,
    Expected,
    SaleAnswer,
    Statement,
    Verdict,
    foreign,
    is_of_another_create,
    judge,
    may_be_sold,
)
from billing_worker.gateway.port import InstantOrder
from billing_worker.persistence import counters, history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import AWAY
from billing_worker.services.attempts.claim import BY, Claimed, ClaimedPage, claim, claim_page
from billing_worker.services.attempts.commit import settle, submit
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.attempts.submit import NotSubmitted, Submit, Submitted
from billing_worker.services.charging import failures
from billing_worker.services.charging.find_by_reference import (
    KNOWN_THERE,
    LATER_KNOWN,
    MAYBE_SOLD,
    UNPROVEN,
    Foreign,
    Found,
    by_reference,
    later_number,
)
from billing_worker.services.charging.previous_attempts import Obstacle, TooEarly, why_no_other
from billing_worker.services.charging.session import ChargeSession, card_token
from billing_worker.services.guards import lost_memory
from billing_worker.services.ports import Ports

CONFIGURATION_ANSWERS = frozenset({401, 403})
"""These answers mean our credentials or permissions, not this charge: the same attempt continues
when they are corrected.
"""

MOST_USELESS = 3
"""After so many gateway invoices that cannot be sold, a person is asked."""

NOT_ENABLED = "instant charges are probably not enabled for this gateway account"

OTHER_MODE = "prepared in the other test mode"
"""Nothing was sold, so the next attempt is made in the present mode."""

STALE_AFTER_SECONDS = 5.0
"""After waiting this long for rate-limit capacity, the worker reads the invoice again before the
sale, and polls earlier attempts again.
"""

OLDEST_NEWS_SECONDS = 60.0
"""After a suspension longer than this since the last poll of earlier attempts, nothing is sold: one
of them may have been paid meanwhile.
"""

NEWS_TOO_OLD = "too late after earlier attempts were asked about"

TROUBLE_ALERT_AGAIN_AFTER = timedelta(minutes=10)

log = structlog.get_logger()


def charge_batch(ports: Ports, invoice_ids: Sequence[int]) -> dict[str, int]:
    """Charge the invoices that are due and not claimed by others. Returns counts by final state."""
    suspects: list[int] = []

    def found() -> list[Claimed]:
        page = _claimed(ports, invoice_ids)
        suspects.extend(page.suspects)
        return page.claimed

    outcomes = ports.pool.take(partial(_charge_safely, ports), found)
    for one in suspects:  # Alone: if it crashes this process again, no other charge is affected.
        outcomes += ports.pool.take(partial(_charge_safely, ports), partial(claim, ports, [one]))
    return dict(Counter(outcomes))


def charge_on_probation(ports: Ports) -> dict[str, int]:
    """While charging is stopped, try one waiting charge from time to time."""
    return charge_batch(ports, []) if ports.breaker.is_open else {}


def _claimed(ports: Ports, invoice_ids: Sequence[int]) -> ClaimedPage:
    for offered in ports.breaker.admitted(invoice_ids, ports.clock):
        page = claim_page(ports, offered)
        if page.claimed or page.suspects:
            return page
        ports.breaker.gone(offered)
    return ClaimedPage([], [])


def _charge_safely(ports: Ports, claimed: Claimed) -> str:
    """Charge one attempt. An error must not stop the others of the batch: sweeps find what
    is left.
    """
    try:
        outcome = charge(ports, claimed)
    except ConcurrentChange as moved:
        return failures.left_to_another(ports, claimed, moved)
    except AWAY as error:
        return failures.interrupted(ports, claimed, error)
    except Exception as error:  # noqa: BLE001 - our bug, or the configuration's; told there
        return failures.crashed(ports, claimed, error)
    failures.passed(ports, claimed)
    return outcome


def charge(ports: Ports, claimed: Claimed) -> str:
    """Drive one claimed attempt as far as possible now. Returns the attempt's state."""
    card_token(ports, claimed.payer)  # Checked before the gateway receives a request.
    session = ChargeSession.of(ports, claimed)
    asked_at = ports.clock.monotonic() if claimed.earlier else math.inf
    obstacle = _earlier_attempts_may_pay(session)
    if obstacle:
        return _settle(session, obstacle)
    found = _fit(session, _invoice_at_gateway(session))
    if isinstance(found, _Useless):
        found = _fit(session, _read_once_more(session, found))
    may_poll = True
    if isinstance(found, Statement):
        # Rate permits for the sale and the following poll are taken before the commit: the sale
        # must follow the commit at once.
        waited = session.wait(2)
        if waited > STALE_AFTER_SECONDS:
            may_poll = False  # this poll uses one permit
            found = _fit(session, _seen_again(session, found))
        if claimed.earlier and ports.clock.monotonic() - asked_at > STALE_AFTER_SECONDS:
            asked_at = ports.clock.monotonic()
            found = _earlier_attempts_may_pay(session) or found
    if isinstance(found, _Useless):
        found = _given_up(claimed, found)
    if not isinstance(found, Statement):
        return _settle(session, found)
    request = Submit(claimed, found, session.shown())
    submitted = submit(ports, request)
    if isinstance(submitted, NotSubmitted):
        return _settle(session, _why_not_armed(submitted))
    return _sell(session.apart(), request, submitted, asked_at, may_poll=may_poll)


# --- before the commit: nothing here moves money ---------------------------------------------


def _earlier_attempts_may_pay(session: ChargeSession) -> News | None:
    """Poll every ended attempt of this invoice once more: a late payment pays it (§11.6)."""
    claimed = session.claimed
    try:
        obstacle = why_no_other(
            session, claimed.key, claimed.earlier, origin=claimed.attempt.origin
        )
    except GatewayError as error:
        return Postponed(f"an earlier attempt could not be asked about: {error.reason}")
    if obstacle is Obstacle.PAID:
        return NothingSent(str(obstacle))
    if isinstance(obstacle, TooEarly):
        return Forbidden(LATE_MONEY_WAITS, LATE_MONEY, obstacle.until)
    return Postponed(str(obstacle), until_it_ends=True) if obstacle else None


def _known_already(session: ChargeSession) -> Statement | News | None:
    """Find what the gateway may know of this attempt from an older claim, or from a time that
    restored books have lost.
    """
    if session.is_our_mode and not session.claimed.create_may_have_been_sent:
        return None
    try:
        return _sought(session)
    except NotSent as error:
        return Postponed(f"gateway not reached: {error.reason}")
    except (Refused, OutcomeUnknown) as error:
        if error.http_status in CONFIGURATION_ANSWERS:
            return _refuses_us(session, error)
        return Postponed(f"it could not be looked for: {error.reason}")


def _sought(session: ChargeSession) -> Statement | News | None:
    claimed = session.claimed
    found = by_reference(session, claimed.key, claimed.attempt)
    if isinstance(found, Foreign):
        return NothingSent(found.whose, hold=True)
    if found is not None:
        return _believed(session, found)
    if claimed.may_be_forgotten and later_number(session, claimed.key, claimed.attempt):
        return NothingSent(LATER_KNOWN)
    return None if session.is_our_mode else NothingSent(OTHER_MODE)


def _invoice_at_gateway(session: ChargeSession) -> Statement | News:
    """Return the gateway's invoice of this attempt.

    It is found by our reference if an earlier create may have reached the gateway, and created
    otherwise.
    """
    known = _known_already(session)
    if known is not None:
        return known
    order = _order(session.ports, session.claimed)
    try:
        return _created(session, order)
    except NotSent as error:
        return Postponed(f"gateway not reached: {error.reason}")
    except (Refused, OutcomeUnknown) as error:
        return _after_failed_create(session, order, error)


def _created(session: ChargeSession, order: InstantOrder) -> Statement | News:
    session.wait()
    sent_at = session.ports.clock.now()
    answered = session.ports.gateway.create(order, session.calls)
    if foreign(answered, _expected(session.claimed)) or not is_of_another_create(
        answered, order.create, sent_at
    ):
        return answered
    maybe_sold = answered.status in UNSOLD_STATUSES
    return _believed(session, Found(answered, maybe_sold, (answered.create,)))


def _expected(claimed: Claimed) -> Expected:
    one = claimed.attempt
    return Expected(one.reference_id, one.money, test_mode=one.test_mode, owner=claimed.payer.owner)


def _order(ports: Ports, claimed: Claimed) -> InstantOrder:
    attempt, payer = claimed.attempt, claimed.payer
    return InstantOrder(
        reference_id=attempt.reference_id,
        money=attempt.money,
        test_mode=attempt.test_mode,
        card_token=card_token(ports, payer),
        customer_reference_id=payer.customer_reference,
        customer_name=payer.customer_name,
        customer_email=payer.customer_email,
        description=payer.description,
        book=payer.owner.book,
        create=ports.name_create(),
    )


def _believed(
    session: ChargeSession, found: Found, *, made_now: int = 0, maybe_now: int = 0
) -> Statement | News:
    """Return the found invoice if it may be sold.

    `made_now`: how many of the invoices under the reference this create has made, proven by its
    name. `maybe_now`: how many others it may have made. Each older claim has sent one create. More
    invoices than that were made in a time that this book has lost.
    """
    claimed = session.claimed
    older = found.count - made_now
    unproven = older > 0 and found.maybe_sold and not claimed.is_proven_unsold
    if unproven and claimed.may_be_forgotten:
        return Postponed(MAYBE_SOLD, until_it_ends=True, maybe_sold=True)
    not_ours = older - maybe_now >= claimed.attempt.fence
    if not_ours and not claimed.may_be_forgotten:
        lost_memory.notice(session.ports, KNOWN_THERE, seen=claimed.restored_at, by=BY)
    # An invoice that has ended may have been sold before: its money may still come.
    ended = not claimed.is_proven_unsold and not found.maybe_sold
    if not_ours or ended:
        return Stated(found.statement, maybe_sold=True)
    return Postponed(UNPROVEN, until_it_ends=True) if unproven else found.statement


def _refuses_us(session: ChargeSession, error: GatewayError) -> News:
    _alert_now_and_then(session, EventKind.GATEWAY_REFUSES_US, reason=error.reason)
    return Postponed(f"gateway refuses our credentials: {error.reason}")


def _after_failed_create(
    session: ChargeSession, order: InstantOrder, error: Refused | OutcomeUnknown
) -> Statement | News:
    """Look for the invoice once after a failed create: the create may have worked, or the reference
    may exist.

    Without an invoice a refusal is final; after any other error the worker looks again later. An
    invoice that is found after a 4xx (409 and 429 may mean a duplicate) was made by an older
    create, unless it bears the name of this one.
    """
    if error.http_status in CONFIGURATION_ANSWERS:
        return _refuses_us(session, error)
    refused = isinstance(error, Refused) or error.reads_like_a_refusal
    doubt = Postponed(f"outcome of create unknown: {error.reason}")
    claimed = session.claimed
    try:
        found = by_reference(session, claimed.key, claimed.attempt)
    except GatewayError:
        return doubt
    if found is None:
        return NothingSent(f"{GATEWAY_REFUSED}: {error.reason}", hold=True) if refused else doubt
    if isinstance(found, Foreign):
        return NothingSent(found.whose, hold=True)
    maybe_now = int(None in found.made_by and not error.is_client_error)
    return _believed(
        session, found, made_now=found.made_by.count(order.create), maybe_now=maybe_now
    )


def _seen_again(session: ChargeSession, found: Statement) -> Statement | News:
    """Read the invoice again: it may have expired during a long wait."""
    try:
        return session.poll(found.gateway_id)
    except GatewayError as error:
        return Postponed(f"could not be looked at again before the sale: {error.reason}")


@dataclass(frozen=True, slots=True)
class _Useless:
    """A new invoice that can never be sold: it has no bearer, or has already ended."""

    statement: Statement
    reason: str


def _read_once_more(session: ChargeSession, useless: _Useless) -> Statement | News:
    """Read the invoice once more: the answer to a create may lack fields that the invoice has."""
    session.wait()
    return _seen_again(session, useless.statement)


def _given_up(claimed: Claimed, useless: _Useless) -> News:
    """Give this invoice up. Another attempt may get a usable one; after some attempts a person is
    asked.
    """
    before = [one for one in claimed.earlier if (one.outcome or "").startswith(useless.reason)]
    number = 1 + sum(one.submitted_at is None for one in before)
    if number < MOST_USELESS:
        return NothingSent(useless.reason, statement=useless.statement)
    reason = f"{useless.reason}, {number} times: {NOT_ENABLED}"
    return NothingSent(reason, hold=True, statement=useless.statement)


def _fit(session: ChargeSession, found: Statement | News | _Useless) -> Statement | News | _Useless:
    """Return the gateway's invoice if it may be sold, otherwise what follows from that."""
    if not isinstance(found, Statement):
        return found
    expected = _expected(session.claimed)
    finding = judge(found, expected)
    if finding.verdict is Verdict.UNPAID_FINAL and found.status == "expired":
        return _Useless(found, finding.reason)
    if finding.verdict is not Verdict.PENDING:
        return Stated(found)
    reason = may_be_sold(found, expected) if session.is_our_mode else OTHER_MODE
    if reason is None:
        return found
    if reason == NO_BEARER:
        return _Useless(found, reason)
    return NothingSent(reason, hold=session.is_our_mode, statement=found)


def _why_not_armed(obstacle: NotSubmitted) -> News:
    if obstacle.forbidden is not None:
        return obstacle.forbidden
    if obstacle.later or obstacle.held:
        return Postponed(obstacle.obstacle)
    return NothingSent(obstacle.obstacle, hold=True)


# --- after the commit -------------------------------------------------------------------------


SETTINGS_ARE_WRONG = frozenset({401, 403, 404, 405})
"""Answers to a sale that every other sale gets too: the address of the cardgate, or its rights."""


def _sell(
    session: ChargeSession,
    request: Submit,
    submitted: Submitted,
    asked_at: float,
    *,
    may_poll: bool,
) -> str:
    """Send the sale that was just committed, once, and only within the gate of a few seconds."""
    ports = session.ports
    if ports.clock.monotonic() - submitted.committed_at > ports.timings.sale_gate_seconds:
        return _settle(session, NothingSent("too late after the commit"))
    if request.claimed.earlier and ports.clock.monotonic() - asked_at > OLDEST_NEWS_SECONDS:
        return _settle(session, NothingSent(NEWS_TOO_OLD))
    try:
        answer = ports.gateway.sale(request.bearer, session.calls)
    except NotSent as error:
        return _settle(session, NothingSent(f"sale not sent: {error.reason}"))
    except (Refused, OutcomeUnknown) as error:
        # Even a clear refusal of a sale has been wrong (§0 E): only the invoice decides.
        if error.http_status in SETTINGS_ARE_WRONG:
            _alert_now_and_then(session, EventKind.SALES_REFUSED, reason=error.reason)
        return _settle(session, NoAnswer(f"sale: {error.reason}"))
    if not may_poll or answer.status not in PAID_STATUSES | DECLINED_STATUSES:
        # After a final answer the invoice is polled at once; any other answer can wait.
        news: News = NoAnswer(f"sale answered {answer.status}")
    else:
        news = _seen_after(session, request.statement.gateway_id)
    return _settle(session, news, answer)


def _seen_after(session: ChargeSession, gateway_id: str) -> News:
    asked_at = session.ports.clock.now()
    try:
        return Stated(session.poll(gateway_id), asked_at)
    except GatewayError as error:
        return NoAnswer(f"look: {error.reason}")


def _settle(session: ChargeSession, news: News, hint: SaleAnswer | None = None) -> str:
    claimed = session.claimed
    request = Settle(claimed.key, news, BY, session.shown(), hint, claimed.attempt.fence)
    return str(settle(session.ports, request).attempt.status)


# --- what is written down ---------------------------------------------------------------------


def _alert_now_and_then(session: ChargeSession, kind: EventKind, **data: object) -> None:
    """Alert once in a while about an error that affects every charge, over all processes."""
    ports = session.ports
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        first = counters.add_unless_recent(connection, kind, now, now - TROUBLE_ALERT_AGAIN_AFTER)
    if first:
        _alert(ports, session.claimed, kind, **data)


def _alert(ports: Ports, claimed: Claimed, kind: EventKind, **data: object) -> None:
    key, event = claimed.key, Event(kind, ports.clock.now(), BY, data, alert=True)
    with ports.store.transaction() as connection:
        history.write(connection, [Entry.about(key, event)])
    log.error("billing.alert", kind=str(kind), attempt=claimed.attempt.reference_id, details=data)
