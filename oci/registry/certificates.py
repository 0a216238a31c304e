# SPDX-License-Identifier: Apache-2.0
"""TLS for each host: the authorities that are trusted, and the client certificate.

The configuration comes first; its `ca_file` replaces the system's authorities. What it leaves open is read
from the directory that Docker and Podman use for the host, the first that exists:

    /etc/containers/certs.d/HOST[:PORT]/
    /etc/docker/certs.d/HOST[:PORT]/
        *.crt           authorities, in addition to the system's
        NAME.cert       a client certificate ...
        NAME.key        ... and its key; of several, the first by name
"""

import contextlib
import ssl
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from oci.registry.sockets import PacedSocket, dial
from oci.registry.url import DEFAULT_PORTS
from rekindle.config import RegistrySettings
from rekindle.errors import UsageError


class Certificates:
    """Makes a TLS context for each host, once: reading all authorities takes 20 ms. For many threads."""

    def __init__(
        self,
        registries: Mapping[str, RegistrySettings],
        directories: Sequence[Path],
        unverified: Collection[tuple[str, int]] = (),
    ) -> None:
        """`registries` are by host, with the port if there is one; `directories` are those of certs.d.

        `unverified` are hosts whose certificates are not verified.
        """
        self._registries = registries
        self._directories = directories
        self._unverified = unverified
        self._lock = threading.Lock()
        self._contexts: dict[tuple[str, int], ssl.SSLContext] = {}

    def context(self, host: str, port: int) -> ssl.SSLContext:
        """Return the context for connections to a host. Raises UsageError for files that cannot be used."""
        with self._lock:
            context = self._contexts.get((host, port))
            if context is None:
                context = self._contexts[host, port] = self._make(host, port)
            return context

    def _make(self, host: str, port: int) -> ssl.SSLContext:
        is_verified = (host, port) not in self._unverified
        host = f"[{host}]" if ":" in host else host
        authority = f"{host}:{port}"
        settings = self._registries.get(authority) or self._registries.get(host) or RegistrySettings()
        names = [authority, host] if port == DEFAULT_PORTS["https"] else [authority]
        directory = _first_of(self._directories, names)
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)
        # An intermediate authority can be trusted by itself, as with Go.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if not is_verified and settings.ca_file is None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif settings.ca_file is not None:
            _trust(context, settings.ca_file, f'the configuration names it for [registry."{host}"]')
        else:
            context.load_default_certs()
            for path in _files(directory, ".crt"):
                _trust(context, path, "it was found by the name of the registry")
        if settings.cert_file is not None and settings.key_file is not None:
            _show(context, settings.cert_file, settings.key_file)
        elif pairs := _pairs(directory):
            _show(context, *pairs[0])
        return context


class _PacedTlsSocket(PacedSocket, ssl.SSLSocket):
    """A TLS socket that keeps a pace."""


class _Context(ssl.SSLContext):
    """A context whose sockets keep a pace."""

    sslsocket_class = _PacedTlsSocket

    def set_alpn_protocols(self, alpn_protocols: object) -> None:
        """Do nothing.

        urllib3 calls this for every connection. OpenSSL then frees the list of protocols while another
        thread may be copying it, and without a list, servers speak HTTP/1.1 anyway.
        """


def speaks_tls(host: str, port: int, seconds: float) -> bool:
    """Tell whether a host whose certificate does not matter speaks TLS. If it cannot be reached: yes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        sock = dial(host, port, seconds, lambda _: contextlib.nullcontext())
    except ConnectionRefusedError:
        return port != DEFAULT_PORTS["https"]  # plain HTTP has another port
    except OSError:
        return True
    with sock:
        try:
            context.wrap_socket(sock, server_hostname=host).close()
        except OSError:
            return False
    return True


def _first_of(roots: Sequence[Path], names: Sequence[str]) -> Path | None:
    for root in roots:
        for name in names:
            if (root / name).is_dir():
                return root / name
    return None


def _files(directory: Path | None, suffix: str) -> list[Path]:
    if directory is None:
        return []
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == suffix)
    except OSError as error:
        raise UsageError(f"cannot read {directory}", cause=str(error)) from None


def _pairs(directory: Path | None) -> list[tuple[Path, Path]]:
    """Return the certificates with their keys. Raises UsageError if there is one without the other."""
    certificates, keys = _files(directory, ".cert"), _files(directory, ".key")
    for path in certificates:
        if path.with_suffix(".key") not in keys:
            raise UsageError(
                f"the client certificate {path} has no key",
                cause=f"there is no {path.with_suffix('.key')}",
                hint="name a certificate of an authority NAME.crt",
            )
    for path in keys:
        if path.with_suffix(".cert") not in certificates:
            raise UsageError(
                f"the key {path} has no client certificate",
                cause=f"there is no {path.with_suffix('.cert')}",
            )
    return [(path, path.with_suffix(".key")) for path in certificates]


def _trust(context: ssl.SSLContext, path: Path, hint: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:  # SSLError is one
        raise UsageError(
            f"cannot use {path} as a certificate authority", cause=str(error), hint=hint
        ) from None


def _show(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def refuse() -> NoReturn:  # otherwise OpenSSL asks for the password on the terminal
        raise UsageError(f"the key {key} is encrypted", hint="rekindle needs it without a password")

    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except OSError as error:
        raise UsageError(
            f"cannot use {certificate} as a client certificate", cause=f"with the key {key}: {error}"
        ) from None
