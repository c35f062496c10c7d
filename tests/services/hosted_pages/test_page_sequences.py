"""Whatever customers, operators, cards, time and the gateway do in turn: an invoice is paid once.

What no client can prevent is that the gateway takes money late, behind our back. Such a second
debit must be surplus, with an alert; and no page and no sale of ours may be the second one where
the first was known or could be asked for.
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import suppress
from datetime import timedelta

from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from billing_worker.domain.errors import BillingError
from billing_worker.persistence import callbacks
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.page_address import page_behind
from billing_worker.services.hosted_pages.pay_link import start_checkout
from tests.support.recovery import replace
from tests.support.world import World

INVOICE = "sub-1-p0"
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)

TOKENS = [
    "approved",
    "decline_insufficient_funds",
    "decline_declined",
    "decline_auth_3ds_required",
    "decline_lost_or_stolen_card",
    "decline_duplicated_transaction",
    "answer_lost_before",
    "pending_forever",
]

STEPS = st.one_of(
    st.tuples(st.just("replace card"), st.sampled_from(TOKENS)),
    st.tuples(st.sampled_from(["storm", "link", "card page"]), st.none()),
    st.tuples(st.sampled_from(["retry", "sweep", "link", "card page"]), st.none()),
    st.tuples(st.just("time"), st.sampled_from([MINUTE, 20 * MINUTE, 2.5 * HOUR, 50 * HOUR])),
    st.tuples(st.sampled_from(["customer pays", "late money", "undecided again"]), st.integers(0)),
)


class Story:
    """One world, and what has to hold in it after every step."""

    def __init__(self, world: World, token: str) -> None:
        self.world = world
        self.pages: list[dict] = []
        self.news_is_out = False  # the gateway knows something that the books may not know
        self.asked = 0
        world.subscribe(token, ends_after_periods=1)
        world.tick()

    # --- steps ---

    def step(self, kind, detail):
        dead, known = self._dead_cards(), self._sold()
        debits = self._debits()
        getattr(self, kind.replace(" ", "_"))(*([] if detail is None else [detail]))
        moves_money = kind in {"customer pays", "late money"}
        assert moves_money or debits == 0 or self._debits() == debits, "sold although it was paid"
        self._check(dead, known)

    def sweep(self):
        self.world.tick()

    def time(self, span):
        self.world.clock.advance(span)
        self.world.tick()

    def replace_card(self, token):
        self.asked += 1
        self._ask(lambda: replace(self.world, f"{token}.{self.asked}"))

    def retry(self):
        store, clock = self.world.store, self.world.clock
        self._ask(lambda: retry_invoice(store, clock, reference=INVOICE, by="ann", why="asked"))

    def link(self):
        self._ask(lambda: self.pages.append(start_checkout(self.world.ports, {"invoice": INVOICE})))

    def card_page(self):
        self.asked += 1
        record = {"reference_id": f"card-{self.asked}", "invoice": INVOICE,
                  "customer": {"reference_id": "customer-of-sub-1"}}  # fmt: skip
        self._ask(lambda: self.pages.append(start_tokenisation(self.world.ports, record)))

    def _ask(self, what):
        with suppress(BillingError):  # Refused: the books tell whether that was right.
            what()

    def customer_pays(self, number):
        if not self.pages:
            return
        page = self.pages[number % len(self.pages)]
        name = page["pay_path"].removeprefix("/pay/")
        if page_behind(self.world.store, self.world.vault, name) is None:
            return
        assert self._rows(tables.invoices)[0].status == "open", "served for what is not owed"
        if not self.news_is_out:
            assert self._debits() == 0, "served although an earlier attempt has paid"
            others = {a.gateway_id for a in self._rows(tables.attempts)} - {page["gateway_id"]}
            pending = [self._at_gateway(g).is_open for g in others if g and self._sold_at(g)]
            assert not any(pending), "served although an earlier attempt may still pay"
        if self.world.sandbox.pay_on_page(page["gateway_id"]).status == 200:
            self.news_is_out = True

    def late_money(self, number):
        """The gateway charges one of its unpaid finals, or what it still has pending, by itself."""
        unpaid = [a for a in self._rows(tables.attempts) if a.gateway_id and self._is_unpaid(a)]
        if unpaid:
            invoice = self._at_gateway(unpaid[number % len(unpaid)].gateway_id)
            self.world.sandbox._books.acquirer.charge(invoice, self.world.clock.now())
            self.news_is_out = True

    def undecided_again(self, number):
        final = [a for a in self._rows(tables.attempts) if a.gateway_id and self._is_unpaid(a)
                 and not self._at_gateway(a.gateway_id).is_open]  # fmt: skip
        if final:
            self._at_gateway(final[number % len(final)].gateway_id).status = "process_pending"
            self.news_is_out = True

    def storm(self):
        """A callback about everything there is, twice."""
        for _ in range(2):
            for attempt in self._rows(tables.attempts):
                with self.world.store.transaction() as connection:
                    callbacks.poll_now(connection, attempt.gateway_id, self.world.clock.now())
                self.world.run("look", (attempt.id,))
        self.world.tick()
        self.news_is_out = False

    # --- what has to hold ---

    def _check(self, dead, known):
        rows = self._rows(tables.attempts)
        live = [a for a in rows if a.status in {"prepared", "submitted"}]
        assert len(live) <= 1, "two live attempts"
        assert [a.status for a in rows].count("succeeded") <= 1, "paid twice"
        on_dead = [
            a.reference_id for a in rows if a.card_id in dead and a.id in self._sold() - known
        ]
        assert on_dead == [], "sold to a dead card"

    def end(self):
        """Ask until all is told, and compare the books with the gateway's ledger."""
        for _ in range(2):
            self.storm()
            self.world.run_for(3 * HOUR, step=HOUR)
        debits = self._debits()
        states = Counter(a.status for a in self._rows(tables.attempts))
        surplus = [e for e in self._rows(tables.events) if e.kind == "attempt.surplus"]
        assert states["succeeded"] == min(debits, 1)
        assert states["surplus"] == len(surplus) == max(debits - 1, 0)
        assert all(event.alert for event in surplus)
        assert self.world.discrepancies() == []

    def _rows(self, table):
        with self.world.store.reading() as connection:
            return connection.execute(select(table).order_by(table.c.id)).all()

    def _debits(self):
        return self.world.debits()[INVOICE]

    def _at_gateway(self, gateway_id):
        return self.world.sandbox._books.with_id(gateway_id)

    def _is_unpaid(self, attempt):
        invoice = self._at_gateway(attempt.gateway_id)
        return not invoice.processed_amount and attempt.status in {"declined", "not_charged"}

    def _sold(self):
        return {a.id for a in self._rows(tables.attempts) if a.submitted_at is not None}

    def _sold_at(self, gateway_id):
        (attempt,) = (a for a in self._rows(tables.attempts) if a.gateway_id == gateway_id)
        return attempt.submitted_at is not None and attempt.sale_status != "not_sent"

    def _dead_cards(self):
        return {c.id for c in self._rows(tables.cards) if c.unusable_reason is not None}


SOFT = "decline_insufficient_funds"
PAID_MEANWHILE = [("card page", None), ("late money", 0), ("storm", None), ("customer pays", 0)]
REOPENED = [("card page", None), ("undecided again", 0), ("storm", None), ("customer pays", 0)]


@settings(max_examples=10, deadline=None)
@example(token=SOFT, steps=PAID_MEANWHILE)
@example(token=SOFT, steps=REOPENED)
@example(token=SOFT, steps=[("link", None), *REOPENED[1:]])
@given(token=st.sampled_from(TOKENS), steps=st.lists(STEPS, min_size=4, max_size=14))
def test_no_sequence_of_charges_cards_pages_and_late_money_pays_an_invoice_twice_unnoticed(
    sqlite_template, tmp_path_factory, token, steps
):
    path = tmp_path_factory.mktemp("story") / "billing.db"
    shutil.copy(sqlite_template, path)
    store = Store(f"sqlite:///{path}")
    try:
        story = Story(World(store), f"{token}.0")
        for kind, detail in steps:
            story.step(kind, detail)
        story.end()
    finally:
        store.close()
