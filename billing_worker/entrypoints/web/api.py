"""`GET /events`, `/subscriptions/…` and `/invoices/…`, for other systems that hold a token."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, Response, jsonify, request

from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.web.bearer import only_with_token
from billing_worker.persistence.outbox import feed
from billing_worker.persistence.store import Store
from billing_worker.services.reports.describe import Kind, describe

MOST_EVENTS: Final = 1_000
USUAL_EVENTS: Final = 100


def api_routes(store: Store, tokens: Secret) -> Blueprint:
    """Without tokens nobody may read: every route answers 503."""
    routes = only_with_token(Blueprint("api", __name__), tokens)

    @routes.get("/events")
    def events() -> Response | tuple[Response, int]:
        """{events: […], last, more}: `last` is the `after` of the next call."""
        after = _whole_number("after", 0)
        limit = _whole_number("limit", USUAL_EVENTS)
        if after is None or limit is None or not 1 <= limit <= MOST_EVENTS:
            reason = f"after must be a whole number, limit one from 1 to {MOST_EVENTS}"
            return jsonify(error=reason), 400
        with store.reading() as connection:
            rows = feed.after(connection, after, limit + 1)
            forgotten = feed.forgotten(connection)
        if after < forgotten:
            reason = f"events up to {forgotten} are deleted, some before it may be left"
            return jsonify(error=reason, forgotten=forgotten), 410
        shown = rows[:limit]
        last = shown[-1].number if shown else after
        more = "true" if len(rows) > limit else "false"
        # The very text that webhooks carry: it is not read and written again.
        bodies = ",".join(row.body for row in shown)
        text = f'{{"events":[{bodies}],"last":{last},"more":{more}}}'
        return Response(
            text, content_type="application/json", headers={"Cache-Control": "no-store"}
        )

    @routes.get("/subscriptions/<path:reference>")
    def subscription(reference: str) -> Response | tuple[Response, int]:
        """A subscription, or a one-off charge."""
        return answer(reference, Kind.SUBSCRIPTION, Kind.CHARGE)

    @routes.get("/invoices/<path:reference>")
    def invoice(reference: str) -> Response | tuple[Response, int]:
        return answer(reference, Kind.INVOICE)

    def answer(reference: str, *kinds: Kind) -> Response | tuple[Response, int]:
        with store.reading() as connection:
            found = [describe(connection, kind, reference) for kind in kinds]
        told = next((one for one in found if one is not None), None)
        if told is None:
            return jsonify(error=f"there is no {kinds[0]} of this reference"), 404
        return jsonify(told)

    return routes


def _whole_number(name: str, usual: int) -> int | None:
    text = request.args.get(name, str(usual))
    is_number = text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER
    return int(text) if is_number else None


_LONGEST_NUMBER: Final = 18
