"""The Redis URL with which every process verifies the server's certificate. It needs only Python."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit


def verified(url: str) -> str:
    """Return a `rediss://` URL that says what redis-py, kombu and Celery each default differently.

    The certificate must be of the host and of a known CA: the system's, or the one of
    `?ssl_ca_certs=FILE`. Only `?ssl_cert_reqs=none` says otherwise.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss" or "ssl_cert_reqs" in parse_qs(parts.query):
        return url
    joined = "&" if parts.query else "?"
    return f"{url}{joined}ssl_cert_reqs=required&ssl_check_hostname=true"
