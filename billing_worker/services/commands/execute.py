"""Carries out commands of other services: each once, each answered, each recorded.

The command's row and its effect are one transaction: a command that is recorded as done is done,
and a process that dies leaves neither. Commands that ask the gateway cannot work so: they are
repeated by their own reference, and recorded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from billing_worker.domain.errors import (
    BillingError,
    ConcurrentChange,
    GatewayError,
    InvalidInput,
    KeysInDoubt,
    NotPayable,
)
from billing_worker.persistence import commands as rows
from billing_worker.persistence.customers import FOREIGN_CARD
from billing_worker.persistence.store import AWAY, CommitUnknown, Within
from billing_worker.services.cards.new_card import replace_card, use_card
from billing_worker.services.cards.remove import remove_card
from billing_worker.services.commands.one_off_charge import charge_once
from billing_worker.services.commands.records import (
    DESCRIBE,
    START_CHECKOUT,
    START_TOKENISATION,
    SUBSCRIBE,
    Cancel,
    CancelCharge,
    Change,
    Command,
    Describe,
    End,
    Forgive,
    NoticeSent,
    OneOff,
    Pause,
    RemoveCard,
    ReplaceCard,
    Reschedule,
    Resume,
    Retry,
    Uncancel,
    UpdateCustomer,
    UseCard,
    parse_command,
    reference_in,
    shown,
)
from billing_worker.services.customers import update_customer
from billing_worker.services.doorbell import ring_for
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.guards import lost_memory
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.import_records.export import differing
from billing_worker.services.import_records.subscription import (
    BadRecord,
    Fault,
    SubscriptionRecord,
    digest_of,
)
from billing_worker.services.notices.accepted import notice_sent
from billing_worker.services.operators.debts import cancel_charge
from billing_worker.services.ports import Ports
from billing_worker.services.reports.describe import Kind, describe
from billing_worker.services.reports.question import explain_any
from billing_worker.services.reports.status import ChargeSettings
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.subscribe import (
    FOREIGN,
    TRIES,
    standing_again,
    subscribe,
)

DONE, UNCHANGED, REFUSED, FAILED = "done", "unchanged", "refused", "failed"

"""Errors that say that the database, or a row in it, is not available now. They say nothing about
the command.
"""

log = structlog.get_logger()


class NotKept(BillingError):
    """Perhaps nothing was recorded: the message must stay in the queue for another try."""


@dataclass(frozen=True, slots=True)
class Message:
    """A command as received. `arguments` may be any JSON."""

    task: str
    arguments: Any
    id: str | None = None
    faults: tuple[Fault, ...] = ()  # faults of the envelope, if any
    unreadable: str | None = None  # an unreadable body, redacted


@dataclass(frozen=True, slots=True)
class Answer:
    status: str  # done, unchanged (done before), refused (see errors), failed (our fault)
    errors: tuple[Fault, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)  # the effect of the task

    def as_json(self) -> dict[str, Any]:
        """Shape: {status, errors: [{field, reason}], …}; the rest depends on the task."""
        return {
            "status": self.status,
            "errors": [{"field": fault.field, "reason": fault.reason} for fault in self.errors],
            **self.told,
        }


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of a command after its transaction is committed."""

    told: Mapping[str, Any]
    invoices_to_ring: Sequence[int] = ()


def carry_out(ports: Ports, message: Message) -> Answer:
    """Carry out one command and record it.

    Raises NotKept while the database is away, while the clock is wrong, or if the command's secrets
    could not be encrypted.
    """
    try:
        clock = lost_memory.why_the_clock_is_wrong(ports)
        if clock is None:
            return _carried_out(ports, message)
    except NotKept:
        raise
    except (ConcurrentChange, *AWAY) as error:
        raise NotKept(f"database: {type(error).__name__}") from error
    except KeysInDoubt as error:
        raise NotKept(str(error)) from error
    except Exception as error:
        log.exception("billing.alert", kind="command.failed", task=message.task, id=message.id)
        fault = Fault("", f"our fault, nothing was done: {type(error).__name__}")
        row = _row(ports, message, _parsed(message))
        return _recorded(ports, row, Answer(FAILED, (fault,)))
    raise NotKept(clock)


def _carried_out(ports: Ports, message: Message) -> Answer:
    parsed = _parsed(message)
    if isinstance(parsed, Command) and parsed.task == DESCRIBE:
        return _described(ports, parsed.record)
    row = _row(ports, message, parsed)
    if isinstance(parsed, Command) and parsed.task in _ASKS_GATEWAY:
        return _paged(ports, row, parsed)
    before = _delivered_before(ports, row)
    if before is not None:
        return before
    if isinstance(parsed, Command):
        return _done_in_turn(ports, row, parsed)
    return _recorded(ports, row, Answer(REFUSED, parsed))


def _described(ports: Ports, asked: Describe) -> Answer:
    """Nothing changes, so that nothing is written down and no lock is taken."""
    settings = ChargeSettings(ports.timings, ports.gateway.service)
    with ports.store.reading() as connection:
        told = describe(connection, Kind(asked.kind), asked.reference, settings)
        if told is not None and asked.at is not None:
            now = ports.clock.now()
            try:
                then = explain_any(connection, asked.reference, now, settings, at=asked.at)
            except InvalidInput as error:
                return Answer(REFUSED, (Fault(error.field, error.reason),))
            told |= {"then": then}
    if told is None:
        return Answer(REFUSED, (Fault(asked.kind, f"there is no {asked.reference!r}"),))
    return Answer(DONE, (), told)


def _parsed(message: Message) -> Command | tuple[Fault, ...]:
    if message.faults:
        return message.faults
    try:
        return parse_command(message.task, message.arguments)
    except BadRecord as error:
        return tuple(error.faults)


def _delivered_before(ports: Ports, row: Mapping[str, Any]) -> Answer | None:
    """Return the answer of an earlier delivery of the same message."""
    if row["message_id"] is None:
        return None
    with ports.store.reading() as connection:
        known = rows.of_message(connection, row["message_id"], row["digest"])
    return _answer_from(known) if known is not None and known.outcome != FAILED else None


def _done_in_turn(ports: Ports, row: dict[str, Any], command: Command) -> Answer:
    """Carry out a command; repeat it once if another one adds the same new customer at that
    moment.
    """
    for _ in range(TRIES - 1):
        try:
            return _done_once(ports, row, command)
        except IntegrityError:
            continue
    return _done_once(ports, row, command)


def _done_once(ports: Ports, row: dict[str, Any], command: Command) -> Answer:
    effect = Effect({})
    with ports.store.transaction() as connection:
        row_id = rows.claim(connection, row)
        if row_id is None:
            answer = _again(connection, row, command)
            rows.add(connection, _with(row, answer))
            return answer
        try:
            effect = _effect(replace(ports, store=Within(connection)), command)
            answer = Answer(DONE, (), effect.told)
        except InvalidInput as error:
            answer = Answer(REFUSED, (Fault(error.field, error.reason),))
        except BadRecord as error:
            answer = Answer(REFUSED, tuple(error.faults))
        rows.conclude(
            connection,
            row_id,
            outcome=answer.status,
            errors=answer.as_json()["errors"],
            answer=dict(answer.told),
        )
    _rung(ports, effect.invoices_to_ring)
    return answer


def _rung(ports: Ports, invoice_ids: Sequence[int]) -> None:
    """Wake workers after the commit. An error here must not turn the answer into `failed`."""
    try:
        ring_for(ports, invoice_ids)
    except Exception as error:  # noqa: BLE001 - whatever a bell may raise; the sweep rings again
        log.warning("command.not_rung", invoices=len(invoice_ids), reason=type(error).__name__)


def _again(connection: Connection, row: dict[str, Any], command: Command) -> Answer:
    """Answer a reference that was used before: for the same command, or for another one."""
    known = rows.done(connection, row["task"], row["reference_id"])
    assert known is not None  # noqa: S101 - it kept us from claiming, and rows are never deleted
    told = _done_before(known.answer)
    if command.task == SUBSCRIBE:
        try:
            told = _subscribed(connection, command.record, UNCHANGED)
        except InvalidInput as error:
            return Answer(REFUSED, (Fault(error.field, error.reason),))
    if known.digest != row["digest"]:
        return Answer(REFUSED, _conflict(known.arguments, row["arguments"]))
    return Answer(UNCHANGED, (), told)


def _done_before(told: Mapping[str, Any]) -> dict[str, Any]:
    """The first answer, but for what it says has changed: this time nothing has."""
    return {
        name: {**inner, "outcome": UNCHANGED}
        if isinstance(inner, Mapping) and "outcome" in inner
        else inner
        for name, inner in told.items()
    }


def _conflict(known: Any, given: Any) -> tuple[Fault, ...]:
    """Return both sides of every difference that may be shown."""
    taken = Fault("reference_id", "is already used by a different command.")
    found = [
        Fault(difference.field, f"was {difference.stored!r}, is now {difference.given!r}.")
        for difference in differing(known, given)
    ]
    return (taken, *(found or [Fault("card.token", "is another one.")]))


# --- the commands ------------------------------------------------------------------------------


def _effect(ports: Ports, command: Command) -> Effect:
    """Carry out the command. Raises InvalidInput or BadRecord, and then nothing was done."""
    return _EFFECTS[command.task](ports, command.record)


def _subscribe(ports: Ports, record: SubscriptionRecord) -> Effect:
    by = f"command:{record.reference_id}"
    done = subscribe(ports.store, ports.vault, ports.clock, [record], by=by)
    if done.conflicts:
        faults = [Fault("reference_id", "is already used by a different subscription.")]
        faults += [
            Fault(d.field, f"is stored as {d.stored!r}, given as {d.given!r}.")
            for d in done.conflicts[0]
        ]
        raise BadRecord(faults)
    if done.outcomes[0] == FOREIGN:
        raise InvalidInput("card.token", FOREIGN_CARD)
    if done.refused:
        raise done.refused[0]
    with ports.store.reading() as connection:
        return Effect(_subscribed(connection, record, done.outcomes[0]))


def _subscribed(connection: Connection, record: SubscriptionRecord, outcome: str) -> dict[str, Any]:
    """What a caller is told: also whether, and when, anything becomes due. Raises InvalidInput."""
    standing = standing_again(connection, record)
    told = {"reference_id": record.reference_id, "outcome": outcome}
    # None: a book that has moved here carried the command out, and left out what was over there.
    return {"subscription": told | (standing.as_dict() if standing else {"status": None})}


def _charge_once(ports: Ports, order: OneOff) -> Effect:
    invoice_id, reference = charge_once(ports.store, ports.vault, ports.clock, ports.timings, order)
    return Effect({"invoice": {"reference_id": reference}}, [invoice_id])


def _cancel_charge(ports: Ports, asked: CancelCharge) -> Effect:
    done = cancel_charge(ports.store, ports.clock, charge=asked.charge, by=asked.by, why=asked.why)
    return Effect({"invoice": done})


def _change(ports: Ports, asked: Change) -> Effect:
    terms = {
        name: getattr(asked, name)
        for name in (
            "amount", "currency", "interval", "interval_count", "description", "catch_up",
            "notices", "ends_at", "amount_from",
        )
    }  # fmt: skip
    return _moved(ports, lifecycle.change, asked, **terms)


def _reschedule(ports: Ports, asked: Reschedule) -> Effect:
    how = {"days": asked.days, "billing_day": asked.billing_day}
    return _moved(ports, lifecycle.reschedule, asked, free_periods=asked.free_periods, **how)


def _pause(ports: Ports, asked: Pause) -> Effect:
    how = {"until": asked.until, "shift_anchor": asked.shift_anchor}
    return _moved(ports, lifecycle.pause, asked, **how)


def _resume(ports: Ports, asked: Resume) -> Effect:
    return _moved(ports, lifecycle.resume, asked, shift_anchor=asked.shift_anchor)


def _cancel(ports: Ports, asked: Cancel) -> Effect:
    how = {"at_period_end": asked.at_period_end, "void_open": asked.void_open}
    return _moved(ports, lifecycle.cancel, asked, **how)


def _uncancel(ports: Ports, asked: Uncancel) -> Effect:
    return _moved(ports, lifecycle.uncancel, asked)


def _end(ports: Ports, asked: End) -> Effect:
    return _moved(ports, lifecycle.end, asked, void_open=asked.void_open)


def _retry(ports: Ports, asked: Retry) -> Effect:
    why = asked.why or "ordered by a command"
    try:
        done = retry_invoice(
            ports.store, ports.clock, reference=asked.invoice, by=asked.by, why=why
        )
    except InvalidInput as error:
        named = "invoice" if error.field == "reference" else error.field
        raise InvalidInput(named, error.reason) from error
    said = {"reference_id": done["invoice"], "next_attempt_at": done["next_attempt_at"]}
    return Effect({"invoice": said})


def _forgive(ports: Ports, asked: Forgive) -> Effect:
    try:
        outcome = lifecycle.forgive(
            ports.store, ports.clock, asked.subscription, by=asked.by, why=asked.why
        )
    except InvalidInput as error:
        raise _about_subscription(error) from error
    return Effect({"subscription": outcome.as_dict()})


def _notice_sent(ports: Ports, asked: NoticeSent) -> Effect:
    done = notice_sent(
        ports.store, ports.clock, ports.timings.notices, subscription=asked.subscription,
        period=asked.period, amount=asked.amount, currency=asked.currency, sent_at=asked.sent_at,
        by=asked.by, why=asked.why,
    )  # fmt: skip
    return Effect({"notice": done})


def _remove_card(ports: Ports, asked: RemoveCard) -> Effect:
    done = remove_card(
        ports.store, ports.clock, customer=asked.customer, card_id=asked.card_id, by=asked.by,
        why=asked.why,
    )  # fmt: skip
    return Effect({"card": done})


def _update_customer(ports: Ports, asked: UpdateCustomer) -> Effect:
    done = update_customer(
        ports.store, ports.clock, customer=asked.customer, name=asked.name, email=asked.email,
        by=asked.by, why=asked.why,
    )  # fmt: skip
    return Effect({"customer": done})


def _replace_card(ports: Ports, asked: ReplaceCard) -> Effect:
    give = partial(replace_card, ports.store, ports.vault, ports.clock, card=asked.card)
    return _given(give, asked)


def _use_card(ports: Ports, asked: UseCard) -> Effect:
    return _given(partial(use_card, ports.store, ports.clock, card_id=asked.card_id), asked)


def _given(give: Callable[..., dict[str, Any]], asked: ReplaceCard | UseCard) -> Effect:
    try:
        done = give(
            subscription_reference=asked.subscription,
            scope=asked.scope,
            by=asked.by,
            why=asked.why,
            decided_at=asked.decided_at,
        )
    except InvalidInput as error:
        raise _about_subscription(error) from error
    return Effect(done | {"subscription": {"reference_id": asked.subscription}})


def _moved(
    ports: Ports,
    move: Callable[..., lifecycle.Outcome],
    asked: Change | Reschedule | Pause | Resume | Cancel | Uncancel | End,
    **how: Any,
) -> Effect:
    try:
        outcome = move(
            ports.store,
            ports.clock,
            asked.subscription,
            by=asked.by,
            why=asked.why,
            decided_at=asked.decided_at,
            **how,
        )
    except InvalidInput as error:
        raise _about_subscription(error) from error
    return Effect({"subscription": outcome.as_dict()})


def _about_subscription(error: InvalidInput) -> InvalidInput:
    """Rename the field: here the reference is the command's, not the subscription's."""
    named = "subscription" if error.field == "reference_id" else error.field
    return InvalidInput(named, error.reason)


_EFFECTS: Mapping[str, Callable[[Ports, Any], Effect]] = {
    SUBSCRIBE: _subscribe,
    "billing.change_subscription": _change,
    "billing.reschedule": _reschedule,
    "billing.pause": _pause,
    "billing.resume": _resume,
    "billing.cancel": _cancel,
    "billing.uncancel": _uncancel,
    "billing.end": _end,
    "billing.retry": _retry,
    "billing.charge_once": _charge_once,
    "billing.cancel_charge": _cancel_charge,
    "billing.forgive": _forgive,
    "billing.notice_sent": _notice_sent,
    "billing.remove_card": _remove_card,
    "billing.update_customer": _update_customer,
    "billing.replace_card": _replace_card,
    "billing.use_card": _use_card,
}


# --- commands that ask the gateway -----------------------------------------------------------------


_ASKS_GATEWAY: Mapping[str, Callable[[Ports, Mapping[str, Any]], dict[str, Any]]] = {
    START_TOKENISATION: start_tokenisation,
    START_CHECKOUT: start_checkout,
}
_KEPT = ("gateway_reference", "gateway_id", "invoice", "amount", "currency")
"""Recorded fields of the answer. The page is not recorded, because whoever has it can pay; a
repeated command returns it again.
"""


def _paged(ports: Ports, row: dict[str, Any], command: Command) -> Answer:
    """No transaction stays open during a gateway call; the command can be repeated safely."""
    with ports.store.reading() as connection:
        known = rows.done(connection, command.task, command.reference_id)
    if known is not None and known.digest != command.digest:
        return _recorded(ports, row, Answer(REFUSED, _conflict(known.arguments, row["arguments"])))
    try:
        told = _ASKS_GATEWAY[command.task](ports, command.record.record)
    except InvalidInput as error:
        return _recorded(ports, row, Answer(REFUSED, (Fault(error.field, error.reason),)))
    except BadRecord as error:
        return _recorded(ports, row, Answer(REFUSED, tuple(error.faults)))
    except NotPayable as error:
        return _recorded(ports, row, Answer(REFUSED, (Fault("invoice", error.reason),)))
    except GatewayError as error:
        return _recorded(ports, row, Answer(FAILED, (Fault("", f"gateway: {error.reason}"),)))
    kept = {name: told[name] for name in _KEPT if name in told}
    with ports.store.transaction() as connection:
        row_id = rows.claim(connection, row)
        answer = Answer(DONE if row_id is not None else UNCHANGED, (), kept)
        if row_id is None:
            rows.add(connection, _with(row, answer))
        else:
            rows.conclude(connection, row_id, outcome=DONE, errors=(), answer=kept)
    return replace(answer, told=told)


# --- what is written down ------------------------------------------------------------------------


def _recorded(ports: Ports, row: dict[str, Any], answer: Answer) -> Answer:
    """Record a command that did nothing. Raises NotKept if that is not possible now."""
    try:
        with ports.store.transaction() as connection:
            rows.add(connection, _with(row, answer))
    except (SQLAlchemyError, CommitUnknown) as error:
        raise NotKept(f"database: {type(error).__name__}") from error
    return answer


def _row(ports: Ports, message: Message, parsed: Command | tuple[Fault, ...]) -> dict[str, Any]:
    reference: str | None
    if isinstance(parsed, Command):
        reference, digest = parsed.reference_id, parsed.digest
    else:
        reference = reference_in(message.arguments)
        digest = digest_of([message.arguments, message.unreadable])
    return {
        "received_at": ports.clock.now(),
        "task": message.task,
        "reference_id": reference,
        "message_id": message.id,
        "arguments": message.unreadable or shown(message.task, message.arguments),
        "digest": digest,
    }


def _with(row: dict[str, Any], answer: Answer) -> dict[str, Any]:
    return row | {
        "outcome": answer.status,
        "errors": answer.as_json()["errors"],
        "answer": dict(answer.told),
    }


def _answer_from(row: Row[Any]) -> Answer:
    faults = tuple(Fault(error["field"], error["reason"]) for error in row.errors)
    return Answer(row.outcome, faults, row.answer)


def described(row: Row[Any]) -> dict[str, Any]:
    """Return a command as the list shows it."""
    return {
        "received_at": row.received_at.isoformat(),
        "task": row.task,
        "reference_id": row.reference_id,
        "message_id": row.message_id,
        "outcome": row.outcome,
        "errors": row.errors,
        "answer": row.answer,
        "arguments": row.arguments,
    }
