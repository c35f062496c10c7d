from __future__ import annotations

from datetime import timedelta

import pytest
from flask import Flask

from billing_worker.config import BadSettings, load
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.web.api import api_routes
from billing_worker.services.outbox.publish import publish
from billing_worker.services.outbox.retention import forget
from tests.entrypoints.test_config import GOOD

TOKENS = ("first-token-of-the-shop", "second-token-of-the-books")

BOTH = ",".join(TOKENS)


@pytest.fixture
def get(world):
    def get(path, token=TOKENS[0], tokens=BOTH):
        app = Flask("test")
        app.register_blueprint(api_routes(world.store, Secret(tokens)))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return app.test_client().get(path, headers=headers)

    return get


def test_the_feed_is_read_page_by_page_until_there_is_no_more(world, get):
    for number in range(5):
        world.subscribe(reference=f"sub-{number}")
    publish(world.store, world.clock)
    first = get("/events?after=0&limit=3").json
    assert [e["data"]["number"] for e in first["events"]] == [1, 2, 3]
    assert (first["last"], first["more"]) == (3, True)
    second = get("/events?after=3&limit=3").json
    assert [e["data"]["number"] for e in second["events"]] == [4, 5]
    assert (second["last"], second["more"]) == (5, False)
    assert get("/events?after=5").json == {"events": [], "last": 5, "more": False}


@pytest.mark.parametrize("token", [None, "", "first-token-of-the-shoq", "first-token", "é" * 20])
def test_a_stranger_reads_nothing(get, token):
    answer = get("/events", token=token and token.encode().decode("latin-1"))
    assert (answer.status_code, answer.json) == (
        401,
        {"error": "needs a bearer token of BILLING_API_TOKENS"},
    )


def test_every_token_of_the_setting_is_good(get):
    assert [get("/events", token=token).status_code for token in TOKENS] == [200, 200]


def test_without_tokens_the_feed_is_off(get):
    assert get("/events", tokens="").status_code == 503


@pytest.mark.parametrize(
    "query", ["after=x", "after=-1", "limit=0", "limit=1001", "after=" + "9" * 40]
)
def test_a_malformed_query_is_named_and_refused(get, query):
    answer = get(f"/events?{query}")
    assert (answer.status_code, "limit" in answer.json["error"]) == (400, True)


def test_a_short_token_is_refused_at_the_start():
    with pytest.raises(BadSettings) as refused:
        load(GOOD | {"BILLING_API_TOKENS": "secret"})
    assert "BILLING_API_TOKENS" in refused.value.faults
    assert "secret" not in str(refused.value)


def test_the_state_of_a_subscription_a_charge_and_an_invoice_is_read(world, get):
    world.subscribe()
    world.tick()
    told = get("/subscriptions/sub-1").json
    assert (told["kind"], told["state"]["status"]) == ("subscription", "active")
    assert get("/invoices/sub-1-p0").json["fate"] == "paid"
    assert get("/invoices/sub-9-p0").status_code == 404
    assert get("/subscriptions/sub-9").status_code == 404
    assert get("/invoices/sub-1-p0", token=None).status_code == 401


def test_a_reader_that_asks_for_what_was_deleted_is_told_so(world, get):
    world.subscribe()
    publish(world.store, world.clock)
    world.clock.advance(timedelta(days=40))
    forget(world.store, world.clock, timedelta(days=30))
    answer = get("/events?after=0")
    assert (answer.status_code, answer.json["forgotten"]) == (410, 1)
    assert get("/events?after=1").json["events"] == []
