"""What a run must have left behind: every way in which it may be wrong, each with a name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from billing_worker.domain import attempt as attempt_rules
from billing_worker.domain.attempt import AttemptStatus
from billing_worker.domain.errors import IllegalTransition
from billing_worker.persistence.schema import tables
from tests.faults.boundaries import Outcome, Plan, Run

AGREED = Decimal("9.99")

_MOVES = {f"attempt.{status}": status for status in AttemptStatus}
_MOVES["attempt.forbidden"] = AttemptStatus.NOT_CHARGED  # by a rule, before anything was sold
_ENDED_UNPAID = {"attempt.declined", "attempt.not_charged"}


class Books:
    """Everything on disk, read once."""

    def __init__(self, run: Run) -> None:
        with run.world.store.reading() as connection:
            self.invoices = connection.execute(select(tables.invoices)).all()
            self.attempts = connection.execute(
                select(tables.attempts).order_by(tables.attempts.c.id)
            ).all()
            self.events = connection.execute(
                select(tables.events).order_by(tables.events.c.id)
            ).all()
            self.cards = connection.execute(select(tables.cards)).all()
        self.ledger = list(run.world.sandbox.ledger)

    def attempts_of(self, invoice: Any) -> list[Any]:
        return [attempt for attempt in self.attempts if attempt.invoice_id == invoice.id]

    def events_of(self, attempt: Any) -> list[Any]:
        return [event for event in self.events if event.attempt_id == attempt.id]


def judge(run: Run, plan: Plan) -> Outcome:
    books = Books(run)
    fates = [_fate(books, invoice) for invoice in books.invoices]
    violations = [f"at once: {seen}" for seen in dict.fromkeys(run.seen)]
    violations += _violations(run, books, fates)
    debits = run.world.debits()
    return Outcome(
        run.scenario,
        plan,
        run.struck,
        run.crossings,
        violations,
        charged_twice=any(count > 1 for count in debits.values()),
        lost=any(fate not in _expected(run, books)[0] for fate in fates) or len(fates) != 1,
        digest=_digest(books),
    )


def _expected(run: Run, books: Books) -> tuple[frozenset[str], frozenset[int]]:
    """(fates, numbers of debits). Whose process dies twice between `submitted` and the sale waits for
    a person: nobody can tell that neither sale arrived.
    """
    unproven = [
        one
        for one in books.attempts
        if one.status == "not_charged" and one.submitted_at and one.sale_status != "not_sent"
    ]
    if len(unproven) > 1:
        return frozenset({"person"}), frozenset({0})
    return run.scenario.fates, run.scenario.debits


def _digest(books: Books) -> tuple[Any, ...]:
    """What two equivalent crashes must agree on, times included."""
    return (
        tuple((i.status, i.reason, i.next_attempt_at, i.paid_at) for i in books.invoices),
        tuple((a.status, a.fence, a.submitted_at, a.settled_at, a.outcome) for a in books.attempts),
        tuple((e.at, e.kind) for e in books.events),
        tuple((d.reference_id, d.at) for d in books.ledger),
    )


def _violations(run: Run, books: Books, fates: list[str]) -> Iterator[str]:
    allowed, amounts = _expected(run, books)
    yield from (f"books: {found}" for found in run.world.discrepancies())
    if len(books.invoices) != 1:
        yield f"one period: it has {len(books.invoices)} invoices"
    for fate in fates:
        if fate not in allowed:
            yield f"fate: {fate}, expected {' or '.join(sorted(allowed))}"
    count = sum(run.world.debits().values())
    if count not in amounts:
        yield f"debits: {count}, expected {' or '.join(map(str, sorted(amounts)))}"
    yield from _agreed(books)
    yield from _sold_once(run, books)
    yield from _replayed(books)
    yield from _one_at_a_time(books)
    yield from _never_called_unpaid(run, books)
    yield from _not_stuck(books)
    yield from _secrets_kept(run, books)
    yield from _history_kept(run)


def _fate(books: Books, invoice: Any) -> str:
    """Exactly one of the fates that a period may have; anything else is spelled out."""
    attempts = books.attempts_of(invoice)
    submitted = [attempt for attempt in attempts if attempt.status == "submitted"]
    prepared = [attempt for attempt in attempts if attempt.status == "prepared"]
    facts = {
        "paid": invoice.status == "paid",
        "waived": invoice.status in {"void", "uncollectible"} and invoice.reason is not None,
        "unknown": bool(submitted) and submitted[0].submitted_at is not None,
        "dated": invoice.status == "open" and invoice.next_attempt_at is not None,
        "person": invoice.status == "open"
        and invoice.next_attempt_at is None
        and invoice.reason is not None
        and not (submitted or prepared),
    }
    held = [name for name, holds in facts.items() if holds]
    return held[0] if len(held) == 1 else f"{' and '.join(held) or 'none'} at once"


def _agreed(books: Books) -> Iterator[str]:
    for debit in books.ledger:
        if debit.amount > AGREED or debit.currency != "USD":
            yield f"agreed amount: {debit.amount} {debit.currency} was taken"
        if not debit.test_mode:
            yield "agreed amount: real money was taken in test mode"


def _sold_once(run: Run, books: Books) -> Iterator[str]:
    for attempt in books.attempts:
        sales = run.world.sales(attempt.reference_id)
        if sales > 1:
            yield f"one sale: {attempt.reference_id} was sold {sales} times"
        if sales and attempt.submitted_at is None:
            yield f"one sale: {attempt.reference_id} was sold and never submitted"


def _replayed(books: Books) -> Iterator[str]:
    """The history, walked through the table of transitions, ends where the row stands."""
    for attempt in books.attempts:
        state: AttemptStatus | None = None
        for event in books.events_of(attempt):
            to = _MOVES.get(event.kind)
            if to is None:
                continue
            try:
                state = attempt_rules.move(state, to) if state else to
            except IllegalTransition as error:
                yield f"history: {attempt.reference_id}: {error}"
                state = to
        if state != attempt.status:
            yield f"history: {attempt.reference_id} is {attempt.status}, its events say {state}"
    for invoice in books.invoices:
        kinds = Counter(event.kind for event in books.events if event.invoice_id == invoice.id)
        if kinds["invoice.opened"] != 1:
            yield f"history: {invoice.reference_id} was opened {kinds['invoice.opened']} times"
        if kinds["invoice.paid"] != (invoice.status == "paid"):
            yield f"history: {invoice.reference_id} was paid {kinds['invoice.paid']} times"


def _one_at_a_time(books: Books) -> Iterator[str]:
    """While one attempt of an invoice may move money, no other is submitted."""
    flying: defaultdict[int, set[int]] = defaultdict(set)
    for event in books.events:
        if event.kind == "attempt.submitted":
            flying[event.invoice_id].add(event.attempt_id)
            if len(flying[event.invoice_id]) > 1:
                yield "one at a time: two attempts of one invoice were submitted at once"
        elif event.kind in _MOVES and event.kind != "attempt.prepared":
            flying[event.invoice_id].discard(event.attempt_id)
    for invoice in books.invoices:
        live = [a for a in books.attempts_of(invoice) if a.status in attempt_rules.LIVE]
        if len(live) > 1:
            yield f"one at a time: {len(live)} attempts of {invoice.reference_id} are live"


def _never_called_unpaid(run: Run, books: Books) -> Iterator[str]:
    """Unknown never becomes failed: nothing that is, or becomes, paid was called unpaid."""
    for attempt in books.attempts:
        debits = [d.at for d in books.ledger if d.reference_id == attempt.reference_id]
        for event in books.events_of(attempt):
            if event.kind not in _ENDED_UNPAID:
                continue
            for at in debits:
                if at <= event.at or not run.scenario.late_money:
                    yield f"unknown is not failed: {event.kind} was written, and it was charged"


def _not_stuck(books: Books) -> Iterator[str]:
    invoices = {invoice.id: invoice for invoice in books.invoices}
    for attempt in books.attempts:
        invoice = invoices[attempt.invoice_id]
        if attempt.status == "prepared" and invoice.enqueue_at is None:
            yield f"stuck: {attempt.reference_id} is prepared and nobody rings for it"
        if attempt.status == "submitted" and attempt.next_poll_at is None:
            yield f"stuck: {attempt.reference_id} is submitted and nobody asks about it"
        if attempt.status != "submitted" and attempt.bearer is not None:
            yield f"secret: {attempt.reference_id} keeps the bearer it needs no more"
    for invoice in books.invoices:
        if invoice.next_attempt_at is not None and invoice.enqueue_at is None:
            yield f"stuck: {invoice.reference_id} has a next step and nobody rings for it"


def _secrets_kept(run: Run, books: Books) -> Iterator[str]:
    bearers = {invoice.bearer for invoice in run.world.sandbox._books.latest(100)}
    secrets = {"card token": {run.scenario.card_token}, "bearer": bearers}
    written = {
        "cards": [bytes(card.token).decode() for card in books.cards],
        "attempts": [bytes(a.bearer).decode() for a in books.attempts if a.bearer is not None],
        "history": [repr(event.data) for event in books.events],
    }
    written["attempts"] += [f"{a.outcome} {a.sale_resolution}" for a in books.attempts]
    for kind, values in secrets.items():
        for place, texts in written.items():
            if any(value in text_ for value in values for text_ in texts):
                yield f"secret: a {kind} stands in {place}"


def _history_kept(run: Run) -> Iterator[str]:
    for statement in ("UPDATE events SET kind = 'x'", "DELETE FROM events"):
        with run.world.store.engine.connect() as connection:
            transaction = connection.begin()
            try:
                connection.execute(text(statement))
            except DBAPIError:
                continue
            finally:
                transaction.rollback()
        yield f"history: {statement.split()[0]} of events was not refused"
