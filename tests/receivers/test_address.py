from __future__ import annotations

import socket

import pytest

from billing_worker.receivers import address
from billing_worker.receivers.address import is_public
from billing_worker.receivers.post import PRIVATE, Poster


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1",
        "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2002:a00:1::",
    ],
)  # fmt: skip
def test_what_is_not_of_the_public_internet_is_refused(text):
    assert not is_public(text)


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_not(text):
    assert is_public(text)


def test_a_name_that_resolves_to_a_private_address_is_not_connected_to(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]
        monkeypatch.setattr(address.socket, "getaddrinfo", lambda *_, **__: found)
        answer = Poster(allow_private=False)(f"http://rebound.example:{port}/", {}, b"{}")
        assert (answer.status, answer.reason) == (None, PRIVATE)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(monkeypatch):
    """A second look-up, which could say something else, is not made."""
    looked, connected = [], []

    def look_up(host, port, **_):
        looked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("93.184.215.14", port))]

    def connect(where, _timeout):
        connected.append(where)
        raise ConnectionRefusedError

    monkeypatch.setattr(address.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(address.socket, "create_connection", connect)
    Poster(allow_private=False)("https://shop.example/", {}, b"{}")
    assert (looked, connected) == (["shop.example"], [("93.184.215.14", 443)])
