"""Checks the addresses of webhooks: only public internet addresses are allowed.

A name is resolved once, right before the connection, and the connection uses an address that was
checked then. A later connection resolves and checks again.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from billing_worker.gateway.deadline import BoundedConnection, BoundedTLSConnection

_TRANSLATED: Final = ip_network("64:ff9b::/96")
"""NAT64: its last 32 bits are an IPv4 address (RFC 6052)."""


class AddressRefusedError(OSError):
    """All addresses of the receiver's name are private, loopback or link-local."""


def is_public(text: str) -> bool:
    """Return whether an address is public. IPv6 forms of an IPv4 address are checked as IPv4."""
    address = ip_address(text.partition("%")[0])
    inner = _inner(address) if isinstance(address, IPv6Address) else None
    if inner is not None:
        return is_public(str(inner))
    return address.is_global and not address.is_multicast


def _inner(address: IPv6Address) -> IPv4Address | None:
    if address in _TRANSLATED:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])


class _PublicOnly(BoundedConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self, [one for one in _found(self) if is_public(one[0])])


class _PublicOnlyTLS(_PublicOnly, BoundedTLSConnection):
    """TLS to a checked address. The certificate must still match the host name of the URL."""


def _found(connection: Any) -> list[tuple[Any, ...]]:
    try:
        infos = socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise NameResolutionError(connection.host, connection, error) from error
    return [info[4] for info in infos]


def _connected(connection: Any, allowed: list[tuple[Any, ...]]) -> socket.socket:
    if not allowed:
        raise AddressRefusedError
    trouble: OSError | None = None
    for address in allowed:
        try:
            return socket.create_connection((address[0], address[1]), connection.timeout)
        except OSError as error:
            trouble = error
    if isinstance(trouble, TimeoutError):
        raise ConnectTimeoutError(connection, "connect timeout") from trouble
    raise NewConnectionError(connection, "no connection") from trouble


class _Pool(HTTPConnectionPool):
    ConnectionCls = _PublicOnly


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _PublicOnlyTLS


PUBLIC_POOLS: Final[dict[str, type[HTTPConnectionPool]]] = {"http": _Pool, "https": _TLSPool}
"""For a urllib3 PoolManager: it connects to public addresses only."""
