"""Addresses in settings: what is accepted, and which would send secrets in clear text.

A ValueError says what the address must be. It repeats no part of it: where a URL cannot be parsed,
any part may be a password.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final
from urllib.parse import SplitResult, parse_qs, urlsplit

from billing_worker.redis_url import verified

_TLS_OF_POSTGRES: Final = {"require", "verify-ca", "verify-full"}
_NOT_A_URL: Final = "is not a URL. In a password write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23 and % as %25."


def http_url(text: str) -> str:
    parts = _split(text, {"http", "https"})
    if not parts.hostname or "@" in parts.netloc:
        raise ValueError("must be an http(s) URL without credentials in it.")
    if "?" in text or "#" in text:
        raise ValueError("must be without a query and without a fragment.")
    return text


def cardgate_url(text: str) -> str:
    if http_url(text).rstrip("/").endswith("/payment/sale"):
        raise ValueError("must be without /payment/sale, which is added to it.")
    return text


def database_url(text: str) -> str:
    parts = _split(text, {"postgresql", "postgres", "postgresql+psycopg", "sqlite"})
    if parts.scheme == "sqlite":
        if parts.netloc:
            raise ValueError("needs three slashes before a relative path: sqlite:///billing.db.")
        if not parts.path.strip("/") or ":memory:" in parts.path or "mode=memory" in parts.query:
            raise ValueError("must name a file: a database in memory forgets its charges.")
        return text
    # SQLAlchemy would look for psycopg2, and does not know `postgres://`.
    return "postgresql+psycopg://" + text.partition("://")[2]


def redis_url(text: str) -> str:
    if not _split(text, {"redis", "rediss"}).hostname:
        raise ValueError("must name a host.")
    return verified(text)


def _split(text: str, schemes: set[str]) -> SplitResult:
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        raise ValueError(_NOT_A_URL) from None
    if parts.scheme not in schemes:
        raise ValueError(f"must begin with one of {', '.join(sorted(schemes))}, then ://")
    # The end of a password that was cut at its / ? or #, or at its first @.
    if parts.netloc.count("@") > 1 or (parts.netloc and "@" in parts.path + parts.fragment):
        raise ValueError(_NOT_A_URL)
    if "@" in parts.query and "@" not in parts.netloc:
        raise ValueError(_NOT_A_URL)
    return parts


def shown(url: str) -> str:
    """Return scheme and host of a URL, which hold no secret; of SQLite all of it."""
    parts = urlsplit(url)
    return url if parts.scheme == "sqlite" else f"{parts.scheme}://{parts.hostname or ''}"


def is_cleartext(url: str, environ: Mapping[str, str]) -> bool:
    """Return whether it leads to another machine without TLS."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    if parts.scheme in {"http", "redis"}:
        return not _is_here(parts.hostname or "")
    if not parts.scheme.startswith("postgresql"):
        return False
    hosts = ",".join([parts.netloc.rpartition("@")[2], *query.get("host", [])]).split(",")
    mode = query.get("sslmode", [environ.get("PGSSLMODE", "")])[-1]
    named = [host for host in hosts if host]
    return mode not in _TLS_OF_POSTGRES and not all(map(_is_here, map(_without_port, named)))


def _without_port(host: str) -> str:
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def _is_here(host: str) -> bool:
    if host == "localhost" or host.startswith("/"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
