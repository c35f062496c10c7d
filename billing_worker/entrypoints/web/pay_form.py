"""The HTML form that sends a browser on to the gateway's page."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from billing_worker.domain.card_setup import Page

SUBMIT: Final = "document.forms[0].submit()"


def render(page: Page) -> str:
    """A whole HTML page that submits the form by itself, or with a button where no script runs."""
    action, fields = _form(page)
    inputs = "".join(
        f'<input type="hidden" name="{html.escape(name)}" value="{html.escape(value)}">'
        for name, value in fields
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Payment</title>'
        f'<form method="{page.method.lower()}" action="{html.escape(action)}">{inputs}'
        f"<button>Continue to payment</button></form><script>{SUBMIT}</script></html>"
    )


def _form(page: Page) -> tuple[str, Iterable[tuple[str, str]]]:
    """A browser that sends a form with GET throws the query of its action away: make it fields."""
    params = list(page.params.items())
    if page.method != "GET":
        return page.action, params
    parts = urlsplit(page.action)
    query = parse_qsl(parts.query, keep_blank_values=True)
    return urlunsplit(parts._replace(query="")), [*query, *params]
