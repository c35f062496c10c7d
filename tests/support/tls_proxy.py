"""A TLS server in front of a port of this machine, with a certificate of a CA made for the test."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)


def _certificate(name, key, issuer, issuer_key, *, is_ca):
    now = datetime.now(UTC)  # noqa: TID251 - TLS compares it with real time
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(not is_ca, *[False] * 4, is_ca, *[False] * 3), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("redis.test")]
                if name == "elsewhere"
                else [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA256())
    )


class TlsProxy:
    """`ca_file` is what a client must trust. `heard` is what came through, in clear."""

    def __init__(self, folder, target_port, name="localhost"):
        self.ca_file = folder / "ca.pem"
        ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        ca = _certificate("test CA", ca_key, None, ca_key, is_ca=True)
        own = _certificate(name, key, ca, ca_key, is_ca=False)
        pem = serialization.Encoding.PEM
        self.ca_file.write_bytes(ca.public_bytes(pem))
        chain = folder / "server.pem"
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain.write_bytes(private + own.public_bytes(pem))
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(chain)
        self._target = target_port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.heard = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._server.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with (
            suppress(OSError, ssl.SSLError),
            client,
            self._tls.wrap_socket(client, server_side=True) as secure,
            socket.create_connection(("127.0.0.1", self._target)) as target,
        ):
            answers = threading.Thread(target=self._copy, args=(target, secure), daemon=True)
            answers.start()
            while data := secure.recv(65_536):
                self.heard += data
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
            answers.join()

    @staticmethod
    def _copy(source, sink):
        with suppress(OSError, ssl.SSLError):
            while data := source.recv(65_536):
                sink.sendall(data)
