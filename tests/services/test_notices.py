from __future__ import annotations

import itertools
from datetime import datetime, timedelta

import pytest
from sqlalchemy import delete

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.outgoing.notice import Agreement, NoticePolicy, needed
from billing_worker.domain.outgoing.webhooks import USUAL_WAITS
from billing_worker.domain.timings import Timings
from billing_worker.persistence.schema import tables
from billing_worker.persistence.subscriptions import whole
from billing_worker.services.attempts.claim import claim
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.forecast.preview import preview
from billing_worker.services.import_records.export import record_from
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.notices.accepted import notice_sent
from billing_worker.services.notices.announce import announce
from billing_worker.services.outbox import endpoints
from billing_worker.services.outbox.deliver import Outbound
from billing_worker.services.outbox.publish import publish
from billing_worker.services.reports.status import show
from billing_worker.services.subscriptions import lifecycle
from tests.support.receivers import SHOP, Receivers, add, send

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
MONTH = timedelta(days=28)  # from 31 January to 28 February
REQUIRE = NoticePolicy.parse("require")


@pytest.fixture
def receivers():
    return Receivers()


@pytest.fixture
def out(world, receivers):
    return Outbound(world.store, world.clock, world.vault, receivers, USUAL_WAITS)


@pytest.fixture
def live(world, out):
    """Lets the world live for a while, in steps, with every sweep in each."""

    def run(span, step=12 * HOUR):
        end = world.clock.now() + span
        while world.clock.now() < end:
            announce(world.store, world.clock, world.ports.timings.notices)
            world.tick()
            send(out)
            world.clock.advance(step)

    return run


def told(receivers, *types):
    names = types or ("renewal.upcoming", "trial.ending")
    return [e["data"] for e in receivers.taken[SHOP] if e["type"] in names]


def ask(world, **fields):
    given = {"subscription": "sub-1", "period": 1, "amount": "9.99", "currency": "USD"}
    return notice_sent(
        world.store, world.clock, world.ports.timings.notices, **given | {"by": "shop"} | fields
    )


def of(world, policy):
    lifecycle.change(world.store, world.clock, "sub-1", notices=policy, by="test")


# --- telling ----------------------------------------------------------------------------------


def test_a_renewal_is_told_seven_days_ahead_once_with_amount_and_date(world, live, receivers):
    add(world)
    world.subscribe(description="Pro plan")
    live(MONTH - 7 * DAY)
    assert told(receivers) == []
    live(12 * HOUR)
    [notice] = told(receivers)
    assert (notice["amount"], notice["currency"], notice["charge"]) == ("9.99", "USD", "sub-1-p1")
    assert notice["charge_at"] == "2026-02-28T12:00:00+00:00"
    assert (notice["period"], notice["edition"], notice["text"]) == (1, 1, "Pro plan")
    live(6 * DAY)
    assert len(told(receivers)) == 1


@pytest.mark.parametrize(
    ("fields", "kind", "days"),
    [
        ({"interval": "year"}, "renewal.upcoming", 30),
        ({"interval_count": 6}, "renewal.upcoming", 30),
        ({"interval": "quarter", "interval_count": 2}, "renewal.upcoming", 30),
        ({"interval": "quarter"}, "renewal.upcoming", 7),
        ({"notices": "tell:14"}, "renewal.upcoming", 14),
        ({"trial_end": "2026-03-31T12:00:00Z"}, "trial.ending", 7),
        ({"trial_end": "2026-03-31T12:00:00Z", "notices": "tell:7:3"}, "trial.ending", 3),
    ],
)
def test_a_notice_goes_out_as_many_days_ahead_as_the_policy_says(
    world, live, receivers, fields, kind, days
):
    add(world)
    world.subscribe(**fields)
    live(DAY)
    start = datetime.fromisoformat(
        receivers.taken[SHOP][-1]["data"]["state"]["subscription"]["next_billing_at"]
    )
    world.clock.advance(start - timedelta(days=days, hours=2) - world.clock.now())
    live(HOUR, HOUR)
    assert told(receivers) == []
    live(HOUR, HOUR)
    [notice] = told(receivers, kind)
    assert datetime.fromisoformat(notice["charge_at"]) == start


def test_no_notice_is_sent_of_a_first_charge_without_a_trial_or_of_one_that_will_not_be_made(
    world, live, receivers
):
    add(world)
    world.subscribe(anchor_at="2026-02-03T12:00:00Z")
    world.subscribe(
        reference="sub-2", anchor_at="2026-01-05T12:00:00Z", paid_through="2026-02-05T12:00:00Z"
    )
    lifecycle.cancel(world.store, world.clock, "sub-2", at_period_end=True, by="test")
    live(7 * DAY)
    assert told(receivers) == []


@pytest.mark.parametrize(
    "text", ["ask", "require:0", "require:91", "tell:7:2", "tell:7:7:7", "tell:x"]
)
def test_a_policy_that_means_nothing_is_refused_by_name(text):
    with pytest.raises(InvalidInput) as refused:
        NoticePolicy.parse(text)
    assert refused.value.field == "notices"


def test_another_amount_or_date_is_told_again_and_the_same_is_not(world, live, receivers):
    add(world)
    world.subscribe()
    live(MONTH - 6 * DAY)
    change = lifecycle.change
    change(world.store, world.clock, "sub-1", amount="12.50", by="test")
    live(12 * HOUR)
    lifecycle.reschedule(world.store, world.clock, "sub-1", days=1, by="test")
    live(12 * HOUR)
    change(world.store, world.clock, "sub-1", description="Pro", by="test")
    live(12 * HOUR)
    assert [(n["amount"], n["charge_at"][:10], n["edition"]) for n in told(receivers)] == [
        ("9.99", "2026-02-28", 1),
        ("12.50", "2026-02-28", 2),
        ("12.50", "2026-03-01", 3),
    ]


def test_a_price_that_changes_at_a_date_is_the_one_that_is_told(world, live, receivers):
    add(world)
    world.subscribe()
    lifecycle.change(
        world.store,
        world.clock,
        "sub-1",
        amount="12.50",
        amount_from="2026-02-10T00:00:00Z",
        by="test",
    )
    live(MONTH - 6 * DAY)
    assert [n["amount"] for n in told(receivers)] == ["12.50"]


def test_every_payment_has_a_receipt_that_says_how_to_cancel(world, out, receivers):
    add(world)
    world.subscribe(description="Pro plan")
    world.tick()
    publish(world.store, world.clock, "https://shop.example/cancel")
    send(out)
    [receipt] = told(receivers, "payment.receipt")
    assert (receipt["amount"], receipt["currency"], receipt["text"]) == ("9.99", "USD", "Pro plan")
    assert receipt["how_to_cancel"] == "https://shop.example/cancel"
    assert receipt["paid_at"] == receipt["state"]["invoice"]["paid_at"]


# --- requiring --------------------------------------------------------------------------------


@pytest.fixture
def strict(world):
    """The worker's default is that a charge waits for its notice."""
    world.ports = world.ports_of_a_worker(Timings(notices=REQUIRE))
    return world


def paid(world, number=1):
    [found] = [i for i in of_subscription(world) if i["period"] == number] or [None]
    return found and found["paid_at"]


def of_subscription(world):
    with world.store.reading() as connection:
        return show(connection, "sub-1")["invoices"]


def test_a_charge_whose_notice_was_accepted_in_time_is_made_on_its_day(strict, live):
    add(strict)
    strict.subscribe()
    live(MONTH + 12 * HOUR)
    assert paid(strict, 0)
    assert paid(strict, 1)[:10] == "2026-02-28"


def test_a_charge_waits_until_its_notice_was_accepted_and_the_days_are_over(
    strict, live, receivers
):
    add(strict)
    strict.subscribe()
    live(MONTH - 8 * DAY)
    receivers.say(503)
    live(8 * DAY + 12 * HOUR)
    assert paid(strict) is None
    explained = strict.explain("sub-1-p1")
    assert explained["reason"] == "notice_not_accepted"
    assert "notice-sent" in explained["next"]
    assert "notice_not_accepted" in strict.alerts()
    receivers.say(200)
    accepted = strict.clock.now()
    live(6 * DAY)
    assert paid(strict) is None
    live(3 * DAY)
    waited = datetime.fromisoformat(paid(strict)) - accepted
    assert 7 * DAY <= waited <= 9 * DAY
    assert "attention.needed" in [e["type"] for e in receivers.taken[SHOP]]


def test_nobody_who_subscribes_to_notices_is_as_good_as_nobody_told(strict, live, receivers):
    endpoints.add(strict.store, strict.vault, strict.clock, url=SHOP, types=["invoice.paid"])
    strict.subscribe()
    live(MONTH + 20 * DAY, DAY)
    assert receivers.sequences() != {}
    assert paid(strict) is None


def test_a_service_that_tells_customers_itself_says_so_and_the_charge_counts_from_then(
    strict, live
):
    strict.subscribe()
    live(MONTH + 12 * HOUR)
    with pytest.raises(InvalidInput, match=r"9\.99"):
        ask(strict, amount="8.99")
    with pytest.raises(InvalidInput, match="period"):
        ask(strict, period=7)
    with pytest.raises(InvalidInput, match="sent_at"):
        ask(strict, sent_at=strict.clock.now() + DAY)
    answer = ask(strict, sent_at=strict.clock.now() - 6 * DAY)
    assert answer["charged_from"] == (strict.clock.now() + DAY).isoformat()
    live(DAY)
    assert paid(strict) is None
    live(12 * HOUR)
    assert paid(strict)


def test_what_was_told_before_our_own_notice_counts_with_it(strict, live, receivers):
    add(strict)
    strict.subscribe()
    live(DAY)
    receivers.say(503)
    ask(strict)
    live(MONTH)
    assert paid(strict)[:10] == "2026-02-28"


def test_another_amount_after_the_notice_makes_the_charge_wait_for_another_notice(
    strict, live, receivers
):
    add(strict)
    strict.subscribe()
    live(MONTH - 4 * DAY)
    lifecycle.change(strict.store, strict.clock, "sub-1", amount="12.50", by="test")
    live(5 * DAY)
    assert paid(strict) is None
    assert strict.explain("sub-1-p1")["reason"] == "notice_accepted_late"
    live(3 * DAY)
    assert paid(strict)
    assert [n["amount"] for n in told(receivers)] == ["9.99", "12.50"]


def test_a_persons_retry_and_a_new_card_do_not_charge_around_the_gate(strict, live):
    strict.subscribe()
    live(MONTH + 12 * HOUR)
    retry_invoice(strict.store, strict.clock, reference="sub-1-p1", by="ann", why="now")
    live(DAY)
    assert paid(strict) is None
    assert strict.explain("sub-1-p1")["reason"] == "notice_not_accepted"


def test_a_policy_that_becomes_strict_holds_back_a_charge_that_was_prepared_and_lost(strict, live):
    strict.ports = strict.ports_of_a_worker(Timings())
    strict.subscribe(anchor_at="2026-01-01T12:00:00Z", paid_through="2026-02-01T12:00:00Z")
    strict.clock.advance(DAY)
    renew_due(strict.ports)
    [claimed] = claim(strict.ports, [1])
    lifecycle.change(strict.store, strict.clock, "sub-1", notices="require", by="test")
    strict.clock.advance(claimed.lease.length)
    live(DAY)
    assert strict.debits() == {}
    assert strict.explain("sub-1-p1")["reason"] == "notice_not_accepted"


@pytest.mark.parametrize("policy", ["tell", "require:1", ""])
def test_a_policy_that_becomes_looser_lets_a_charge_go_that_waited(strict, live, policy):
    add(strict)
    strict.subscribe()
    of(strict, "require:90")
    live(MONTH + DAY)
    assert strict.explain("sub-1-p1")["reason"] == "notice_accepted_late"
    of(strict, policy)
    live(DAY)
    assert paid(strict)[:10] == "2026-03-01"


def test_a_policy_that_stays_strict_does_not_let_a_charge_go_when_it_changes(strict, live):
    add(strict)
    strict.subscribe()
    of(strict, "require:90")
    live(MONTH + DAY)
    of(strict, "require:80")
    live(2 * DAY)
    assert paid(strict) is None


def test_late_periods_wait_each_for_its_notice_and_are_collected_on_days_of_their_own(strict, live):
    add(strict)
    strict.subscribe(interval="week", catch_up="collect_all:2", notices="require:2")
    live(8 * DAY)
    strict.clock.advance(22 * DAY)
    live(14 * DAY)
    paid_at = [
        datetime.fromisoformat(i["paid_at"]) for i in of_subscription(strict) if i["paid_at"]
    ]
    assert len(paid_at) == 7
    gaps = [later - earlier for earlier, later in itertools.pairwise(sorted(paid_at))]
    assert min(gaps) >= DAY
    assert strict.discrepancies() == []


def test_a_renewal_that_comes_sooner_than_its_notice_waits_for_the_rest(strict, live):
    add(strict)
    strict.subscribe(anchor_at="2026-01-03T12:00:00Z", paid_through="2026-02-03T12:00:00Z")
    live(7 * DAY)
    assert paid(strict) is None
    live(DAY)
    assert paid(strict)


def test_a_short_interval_is_charged_as_much_later_and_no_period_is_lost(strict, live):
    add(strict)
    strict.subscribe(interval="day")
    live(20 * DAY)
    days = [i["period"] for i in of_subscription(strict) if i["paid_at"]]
    assert sorted(days) == list(range(len(days)))
    assert len(days) in {14, 13}


def test_a_pause_keeps_the_date_and_the_charge_waits_for_the_new_one(strict, live, receivers):
    add(strict)
    strict.subscribe()
    live(MONTH - 3 * DAY)
    lifecycle.pause(strict.store, strict.clock, "sub-1", by="test")
    live(10 * DAY)
    lifecycle.resume(strict.store, strict.clock, "sub-1", shift_anchor=True, by="test")
    live(4 * DAY)
    assert paid(strict) is None
    live(6 * DAY)
    assert paid(strict)
    assert [n["edition"] for n in told(receivers)] == [1, 2]


def test_what_another_book_or_a_backup_forgot_is_told_again_and_nothing_is_charged_meanwhile(
    strict, live
):
    add(strict)
    strict.subscribe()
    live(MONTH - 3 * DAY)
    with strict.store.transaction() as connection:
        connection.execute(delete(tables.notices))
    live(6 * DAY)
    assert paid(strict) is None
    live(4 * DAY)
    assert paid(strict)


def test_a_one_off_charge_and_a_customer_on_a_page_wait_for_no_notice():
    one_off = Agreement(REQUIRE, is_one_off=True, had_trial=True, is_long=True)
    assert needed(one_off, 0, REQUIRE) is None


def test_the_preview_says_what_waits_and_what_will_not(strict, live):
    def lines(days):
        now = strict.clock.now()
        found = preview(strict.store, now, now + days * DAY, Timings(notices=REQUIRE))
        return {one.period: (one.reason, one.at) for one in found}

    strict.subscribe()
    live(DAY)
    assert lines(28)[1][0] is None  # there is time to tell
    live(MONTH - 4 * DAY)
    reason, _ = lines(28)[1]
    assert reason == "waits for a notice: its customer was not told early enough"
    at = datetime.fromisoformat(ask(strict)["charged_from"])
    assert lines(28)[1] == (None, at)
    live(5 * DAY)
    assert lines(28)[1] == (None, at)
    live(6 * DAY)
    assert paid(strict)[:10] == at.isoformat()[:10]


# --- both doors -------------------------------------------------------------------------------


def test_a_policy_of_its_own_travels_with_the_record_and_is_taken_back_by_an_empty_one(world):
    world.subscribe(notices="require:30:5")
    with world.store.reading() as connection:
        [row] = whole(connection, ["sub-1"])
    record = record_from(row, world.vault)
    assert record.as_json(with_token=True)["notices"] == "require:30:5"
    assert parse_record(record.as_json(with_token=True)).digest == record.digest
    lifecycle.change(world.store, world.clock, "sub-1", notices="", by="test")
    with world.store.reading() as connection:
        [row] = whole(connection, ["sub-1"])
    assert row.notices is None
    with pytest.raises(InvalidInput, match="notices"):
        lifecycle.change(world.store, world.clock, "sub-1", notices="never", by="test")


def test_a_command_says_that_the_customer_was_told_once_by_its_key(strict, live):
    strict.subscribe()
    live(DAY)
    told_by_shop = {"reference_id": "n-1", "subscription": "sub-1", "period": 1, "amount": "9.99",
                    "currency": "USD"}  # fmt: skip
    first = carry_out(strict.ports, Message("billing.notice_sent", told_by_shop, id="m-1"))
    again = carry_out(strict.ports, Message("billing.notice_sent", told_by_shop, id="m-2"))
    assert (first.status, again.status) == ("done", "unchanged")
    assert first.told["notice"]["invoice"] == "sub-1-p1"
    wrong = told_by_shop | {"reference_id": "n-2", "amount": "10.00"}
    refused = carry_out(strict.ports, Message("billing.notice_sent", wrong, id="m-3"))
    assert [one.field for one in refused.errors] == ["amount"]
    live(MONTH)
    assert paid(strict)[:10] == "2026-02-28"


def test_a_policy_of_a_later_version_stops_its_own_subscription_and_no_other(
    strict, live, receivers
):
    add(strict)
    for reference in ("sub-0", "sub-1"):
        strict.subscribe(reference=reference, notices="require")
    with strict.store.transaction() as connection:
        c = tables.subscriptions.c
        later = tables.subscriptions.update().where(c.reference_id == "sub-0")
        connection.execute(later.values(notices="ask"))
    live(MONTH + DAY)
    assert paid(strict)[:10] == "2026-02-28"
    assert {one["subscription"] for one in told(receivers)} == {"sub-1"}
