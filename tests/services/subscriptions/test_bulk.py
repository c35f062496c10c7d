"""New terms for many, while other decisions are made about some of them."""

from __future__ import annotations

from billing_worker.services.subscriptions import bulk, lifecycle
from tests.support.recovery import subscription


def test_who_takes_another_price_while_the_prices_of_many_change_keeps_it(world, monkeypatch):
    for reference in ("sub-1", "sub-2"):
        world.subscribe("approved", reference=reference)
    found = bulk._references

    def found_and_then_overtaken(store, terms):
        references = list(found(store, terms))
        lifecycle.change(world.store, world.clock, "sub-2", amount="4.99", by="bob")
        yield from references

    monkeypatch.setattr(bulk, "_references", found_and_then_overtaken)
    where = {"amount": "9.99", "currency": "USD"}
    done = bulk.change_where(
        world.store, world.clock, where, by="ann", dry_run=False, amount="12.99"
    )
    assert (done.changed, done.refused) == (1, {})
    assert [subscription(world, one).amount_minor for one in ("sub-1", "sub-2")] == [1299, 499]
