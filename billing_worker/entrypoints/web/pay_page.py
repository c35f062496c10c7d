"""`GET /pay/<name>`: sends the customer's browser to the gateway's page."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from flask import Blueprint, Response

from billing_worker.entrypoints.web.pay_form import SUBMIT, render
from billing_worker.persistence.store import Store
from billing_worker.services.hosted_pages.page_address import is_paid, page_behind
from billing_worker.services.ports import Vault

_HASH: Final = base64.b64encode(hashlib.sha256(SUBMIT.encode()).digest()).decode()
_HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    # Anyone with the address can pay: it must not be cached, shown or passed on.
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'sha256-{_HASH}'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
_GONE: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Link not valid</title>'
    "<p>This link is no longer valid. There is nothing to pay here.</p></html>"
)
_PAID: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Paid</title>'
    "<p>This is paid. There is nothing more to pay here.</p></html>"
)


def pay_routes(store: Store, vault: Vault) -> Blueprint:
    routes = Blueprint("pay", __name__)

    @routes.get("/pay/<name>")
    def pay(name: str) -> Response:
        """Send the page, or say that it is paid. Answers 410 alike for an ended and an unknown page, so
        that nobody learns which.
        """
        page = page_behind(store, vault, name)
        if page is None and is_paid(store, name):
            return Response(_PAID, 200, _HEADERS)
        if page is None:
            return Response(_GONE, 410, _HEADERS)
        return Response(render(page), 200, _HEADERS)

    return routes
