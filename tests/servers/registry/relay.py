# SPDX-License-Identifier: Apache-2.0
"""Servers that stand before others: one that ends TLS, one that is not there yet, a proxy.

authority = Authority(tmp_path)
with Registry() as registry, Tls(authority.issue("127.0.0.1"), registry.host) as front:
    …                                                # https://{front.host}, trusted by authority.certificate
"""

import base64
import contextlib
import datetime
import ipaddress
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PIECE_BYTES = 1 << 16
_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority of the tests', at `certificate`."""

    def __init__(self, place: Path, name: str = "authority", parent: "Authority | None" = None) -> None:
        self._place = place
        place.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer = parent or self
        built = (
            _unsigned(self._name, signer._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(signer._key, hashes.SHA256())
        )
        self.certificate = place / f"{name}.crt"
        self.certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))

    def issue(self, *names: str, password: str = "") -> Pair:
        """A certificate for names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        built = (
            _unsigned(subject, self._name, key.public_key())
            .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pair = Pair(self._place / f"{names[0]}.cert", self._place / f"{names[0]}.key")
        pair.certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
        sealed: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password:
            sealed = serialization.BestAvailableEncryption(password.encode())
        form = serialization.PrivateFormat.PKCS8
        pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, sealed))
        return pair


def _general_name(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


class Relay:
    """Passes what comes to `port` on to another server of this machine, from `start` on.

    Without `start`, connections are taken by the system until its queue is full, and after that by nobody.
    """

    def __init__(self, backend: str = "", *, backlog: int = 128) -> None:
        self._backend = backend
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.port = int(self._listener.getsockname()[1])
        self.host = f"127.0.0.1:{self.port}"
        self.accepted = 0
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False

    def start(self) -> None:
        self._run(self._accept)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections and threads."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_TIMEOUT_SECONDS)
            assert not thread.is_alive()

    def _run(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closing:
                connection, _ = self._listener.accept()
                self.accepted += 1
                self._run(self._serve_and_close, connection)

    def _serve_and_close(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), self._kept(connection):
            self.serve(connection)

    @contextlib.contextmanager
    def _kept(self, sock: socket.socket) -> Iterator[None]:
        sock.settimeout(_TIMEOUT_SECONDS)
        self._open.add(sock)
        try:
            if self._closing:
                raise ConnectionAbortedError
            yield
        finally:
            self._open.discard(sock)
            sock.close()

    def serve(self, connection: socket.socket) -> None:
        """Serves one connection until it ends."""
        self.pass_on(connection, self._backend)

    def pass_on(self, connection: socket.socket, backend: str) -> None:
        """Passes all on, both ways, until one side ends. TLS must not be read and written by two threads."""
        host, _, port = backend.rpartition(":")
        other = socket.create_connection((host, int(port)), timeout=_TIMEOUT_SECONDS)
        with self._kept(other):
            ways = {connection: other, other: connection}
            while True:
                pending = isinstance(connection, ssl.SSLSocket) and connection.pending()
                ready = [connection] if pending else select.select([*ways], [], [], _TIMEOUT_SECONDS)[0]
                for source in ready:
                    piece = source.recv(_PIECE_BYTES)
                    if not piece:
                        return
                    ways[source].sendall(piece)


class Tls(Relay):
    """Ends TLS before a server. With `clients`, it takes nobody without a certificate of that authority.

    `names` are the host names that were asked for, `shown` the common names of the clients.
    """

    def __init__(self, pair: Pair, backend: str, *, clients: Path | None = None) -> None:
        super().__init__(backend)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pair.certificate, pair.key)
        if clients is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(clients)
        self.names: list[str | None] = []
        self.shown: list[str] = []
        self._context.sni_callback = lambda _, name, __: self.names.append(name)

    def serve(self, connection: socket.socket) -> None:
        with self._context.wrap_socket(connection, server_side=True) as inner, self._kept(inner):
            subject = (inner.getpeercert() or {}).get("subject", ())
            self.shown += [str(pair[1]) for part in subject for pair in part if pair[0] == "commonName"]
            super().serve(inner)


class Proxy(Relay):
    """An HTTP proxy, which reaches by `places` the servers that are behind it.

    `places` are by host with port. `asked` are the request lines, `headers` what came with each. With a
    `login` ("user:password"), nobody else gets through. `answer` is said in place of every answer of CONNECT,
    byte by byte if it `drips`.
    """

    def __init__(
        self, places: Mapping[str, str], *, login: str = "", answer: bytes = b"", drips: bool = False
    ) -> None:
        super().__init__()
        self._drips = drips
        self._places = places
        self._login = login
        self._answer = answer
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []

    def serve(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        with stream:
            while line := stream.readline().decode():
                head = [line.strip()]
                while (line := stream.readline().decode().strip()) != "":
                    head.append(line)
                if not self._serve_request(connection, stream, head):
                    return

    def _serve_request(self, connection: socket.socket, stream: IO[bytes], head: list[str]) -> bool:
        """False if the connection is over."""
        parts = (line.partition(":") for line in head[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in parts}
        self.asked.append(head[0])
        self.headers.append(headers)
        method, target, _ = head[0].split(" ")
        wanted = "Basic " + base64.b64encode(self._login.encode()).decode()
        if self._login and headers.get("proxy-authorization") != wanted:
            connection.sendall(
                b"HTTP/1.1 407 Who?\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n"
            )
            return method != "CONNECT"
        if method == "CONNECT":
            answer = self._answer or b"HTTP/1.1 200 Connected\r\n\r\n"
            for piece in [bytes([byte]) for byte in answer] if self._drips else [answer]:
                connection.sendall(piece)
                time.sleep(0.05 if self._drips else 0)
            self.pass_on(connection, self._places[target])
            return False
        assert target.startswith("http://")
        where, _, path = target.removeprefix("http://").partition("/")
        backend = self._places[where if ":" in where else f"{where}:80"]
        lines = [f"{method} /{path} HTTP/1.1", *(h for h in head[1:] if not h.lower().startswith("proxy-"))]
        request = "\r\n".join([*lines, "Connection: close\r\n\r\n"]).encode()
        self._forward(connection, stream, backend, request, int(headers.get("content-length", 0)))
        return True

    def _forward(
        self, connection: socket.socket, stream: IO[bytes], backend: str, request: bytes, body_bytes: int
    ) -> None:
        """Sends a request to where it is meant for, and its answer back; both are over then."""
        host, _, port = backend.rpartition(":")
        other = socket.create_connection((host, int(port)), timeout=_TIMEOUT_SECONDS)
        with self._kept(other):
            other.sendall(request)
            while body_bytes:
                piece = stream.read(min(body_bytes, _PIECE_BYTES))
                other.sendall(piece)
                body_bytes -= len(piece)
            while piece := other.recv(_PIECE_BYTES):
                connection.sendall(piece)
