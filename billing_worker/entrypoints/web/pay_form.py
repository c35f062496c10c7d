"""The HTML form that sends a browser to the gateway's page."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from billing_worker.domain.card_setup import Page

SUBMIT: Final = "document.forms[0].submit()"


def render(page: Page) -> str:
    """Return an HTML page that submits the form by itself, or has a button where no script runs."""
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
    """Return the form. With GET a browser drops the query of the action, so the query becomes
    fields.
    """
    params = list(page.params.items())
    if page.method != "GET":
        return page.action, params
    parts = urlsplit(page.action)
    query = parse_qsl(parts.query, keep_blank_values=True)
    return urlunsplit(parts._replace(query="")), [*query, *params]
