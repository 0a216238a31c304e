# SPDX-License-Identifier: Apache-2.0
"""The published addresses: bound before the server starts, opened once it is ready, or early if asked for.

An address that is open early accepts connections into its queue, where nothing is answered until the server
is ready. Why that is not the default: docs/adr/0030-listen-early.md.
"""

import contextlib
import functools
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from msgspec import Struct

from rekindle.engine import Endpoint
from rekindle.errors import PortError
from rekindle.report import ServerAddress
from restore.decide.publications import Publication
from restore.serve.balancer import turn_away
from restore.serve.shared_port import SharedPort

_BACKLOG = 1024


def bind(endpoint: Endpoint, *, only_ipv6: bool = False) -> socket.socket:
    """Bind an address without listening: connections are refused until `listen`. Raises PortError.

    With `only_ipv6`, `::` does not take the port of IPv4, too.
    """
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        if not endpoint.host.replace(".", "").isdigit() and family is socket.AF_INET:
            address = socket.getaddrinfo(endpoint.host, endpoint.port, family)[0][4][0]
        else:
            address = endpoint.host
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if only_ipv6 and family is socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, endpoint.port))
        except BaseException:
            sock.close()
            raise
    except (OSError, ValueError, TypeError) as error:  # ValueError and TypeError: an invalid host name
        raise _port_error(endpoint, error) from error
    return sock


def listen(sock: socket.socket, endpoint: Endpoint) -> None:
    """Listen on a bound address. Raises PortError if another process listens there by now."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _port_error(endpoint, error) from error


class Bound(Struct, kw_only=True):
    """A publication, with its socket while that is bound, or the port that it shares with other replicas."""

    publication: Publication
    sock: socket.socket | None = None
    shared: SharedPort | None = None
    problem: str = ""

    is_open: bool = False  # and whoever waits there is to be turned away
    is_inherited: bool = False  # somebody else has the socket, too, and those who wait there

    def close(self) -> None:
        if self.shared is not None:
            self.shared.close()
            self.shared = None
        if self.sock is not None:
            if self.is_open and not self.is_inherited:
                turn_away(self.sock)
            self.sock.close()
            self.sock = None


class Addresses:
    """The published addresses of a restore: bound by us, or released for the server to bind."""

    def __init__(
        self,
        publications: Sequence[Publication],
        inherited: Sequence[int] = (),
        *,
        ports: Path | None = None,
        is_early: bool = False,
    ) -> None:
        """Bind the addresses. Raises PortError if one that is required is taken.

        `inherited` are descriptors of listening sockets, which are used for the addresses that they have.
        With `ports`, the directory of shared ports, each is shared with other replicas. With `is_early`,
        connections wait from now on until the server is ready.
        """
        self.all: list[Bound] = []
        self._inherited = inherited
        self._ports, self._is_early = ports, is_early
        self.add(publications)

    def add(self, publications: Sequence[Publication]) -> None:
        """Bind more addresses. Raises PortError if one that is required is taken; all are released then."""
        known = [*(each.publication for each in self.all), *publications]
        ipv4 = {each.at.port for each in known if ":" not in each.at.host}
        try:
            for each in publications:
                bound = Bound(publication=each)
                self.all.append(bound)
                take = functools.partial(bind, each.at, only_ipv6=each.at.port in ipv4)
                with _noting(bound):
                    if self._ports is not None:
                        bound.shared = SharedPort(self._ports, each.at, take, is_early=self._is_early)
                    else:
                        bound.sock = _adopted(each.at, self._inherited)
                        bound.is_inherited = bound.sock is not None
                        bound.sock = bound.sock or take()
            if self._is_early:
                self.listen_early()
        except BaseException:
            self.release()
            raise

    @property
    def main(self) -> Endpoint | None:
        """The address of this host that leads to the server's main port; None if none does."""
        return next((each.publication.at for each in self.all if each.publication.listens is None), None)

    def release_own(self, main: Endpoint | None) -> list[Endpoint]:
        """Release what a server on this host, whose main address is `main`, binds itself.

        Returns the server's addresses to which the others lead.
        """
        targets = []
        for each in self.all:
            target = each.publication.listens or main
            if target is None or _is_same(each.publication.at, target):
                each.close()
            elif each.sock is not None:
                targets.append(target)
        return targets

    def listen_early(self) -> None:
        """Let connections wait until the server is ready. Raises PortError."""
        for each in self.all:
            if each.sock is not None:
                with _noting(each):
                    listen(each.sock, each.publication.at)
                    each.is_open = True

    def filenos(self) -> list[int]:
        """Return the descriptors of the sockets."""
        return [each.sock.fileno() for each in self.all if each.sock is not None]

    def listen(self, main: Endpoint | None) -> list[tuple[socket.socket, Endpoint]]:
        """Listen on the addresses that are bound. Returns each with the server's.

        Raises PortError.
        """
        found = []
        for each in self.all:
            target = each.publication.listens or main
            if each.sock is not None and target is not None:
                with _noting(each):
                    listen(each.sock, each.publication.at)
                    each.is_open = False  # whoever accepts from it closes it
                    found.append((each.sock, target))
        return found

    def shared(self, main: Endpoint | None) -> list[tuple[SharedPort, Endpoint]]:
        """Return the ports that are shared with other replicas, each with the server's address."""
        targets = ((each.shared, each.publication.listens or main) for each in self.all)
        return [(port, target) for port, target in targets if port is not None and target is not None]

    def published(self, main: Endpoint | None) -> list[ServerAddress]:
        """Return the addresses at which clients reach the server, or should, for the report.

        A server that binds an address itself, although it is not its main one, may not do so.
        """
        return [
            ServerAddress(
                server=str(each.publication.listens or main or each.publication.at),
                published=None if each.problem else str(each.publication.at),
                problem=each.problem,
            )
            for each in self.all
            if each.publication.required or each.sock is not None or each.shared is not None or each.problem
        ]

    def release(self) -> None:
        """Close the sockets, so that the server can bind the addresses. Idempotent."""
        for each in self.all:
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _adopted(at: Endpoint, inherited: Sequence[int]) -> socket.socket | None:
    """Return the inherited socket that listens at an address, if there is one."""
    for fd in inherited:
        sock = socket.socket(fileno=os.dup(fd))
        host, port = sock.getsockname()[:2]
        if port == at.port and (host == at.host or at.host in {"", "localhost"}):
            return sock
        sock.close()
    return None


def _is_same(published: Endpoint, listens: Endpoint) -> bool:
    """Return whether a server that listens at `listens` on this host needs no forwarding to `published`."""
    if published == listens:
        return True
    return published.port == listens.port and listens.host in {"", "0.0.0.0", "::"}


@contextlib.contextmanager
def _noting(bound: Bound) -> Iterator[None]:
    """Note that an address cannot be bound, unless it is required. Raises PortError."""
    try:
        yield
    except PortError as error:
        if bound.publication.required:
            raise
        bound.close()
        bound.problem = error.cause


def _port_error(endpoint: Endpoint, error: Exception) -> PortError:
    return PortError(
        f"cannot publish {endpoint}",
        cause=getattr(error, "strerror", None) or str(error),
        hint="choose another address with --publish [HOST:]PORT, or end the process that listens there",
    )
