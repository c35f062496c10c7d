"""Which addresses a webhook may be sent to: those of the public internet, and no others.

A name is looked up once, right before connecting, and the connection goes to an address that was
checked then. A name that resolves to another address later is checked again later.
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
    """Every address of the receiver's name is private, or of this machine, or of the link."""


def is_public(text: str) -> bool:
    """Whether an address is of the public internet. IPv6 forms of an IPv4 address count as that."""
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
    """The host of the certificate stays the name of the URL."""


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
"""For a urllib3 PoolManager: it then connects to public addresses only."""
