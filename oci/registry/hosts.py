# SPDX-License-Identifier: Apache-2.0
"""A registry and its mirrors: which of them are asked, and in which order."""

import threading
import urllib.parse
from collections.abc import Callable
from typing import TypeVar

from oci.reference import RegistryReference
from oci.registry.access import Access, Routes
from oci.registry.host import Host
from oci.registry.transport import Connections
from rekindle.errors import NotFoundError, RekindleError, UsageError

T = TypeVar("T")

_STRIKES_LIMIT = 3


class Hosts:
    """The registry itself, called the origin, and its mirrors, which are asked first. For many threads."""

    def __init__(self, reference: RegistryReference, routes: Routes, access: Access) -> None:
        """`routes` are where the origin and its mirrors are."""
        from oci.registry.certificates import Certificates  # ssl takes 5 ms

        unverified = {
            (each.url.host, each.url.port)
            for each in (routes.origin, *routes.mirrors)
            if not each.is_verified
        }
        certificates = Certificates(access.config.registries, access.certs_d, unverified)
        self.connections = Connections(access.config.transfer, certificates.context)
        find = access.find_credentials
        name = reference.api_host
        self.origin = Host(
            routes.origin.url,
            self.connections,
            find,
            name=name,
            login=routes.origin.name,
            repository=reference.repository,
            there=routes.origin.repository,
        )
        query = urllib.parse.urlencode({"ns": reference.host})  # as containerd asks its mirrors
        self._lock = threading.Lock()
        self._strikes: dict[str, int] = {}
        self._mirrors = [
            Host(
                each.url,
                self.connections,
                find,
                name=each.name,
                login=urllib.parse.urlsplit(each.name).netloc or each.name,
                repository=reference.repository,
                there=each.repository,
                query=query,
                attempts=1,  # the next attempt is the one at the origin
            )
            for each in routes.mirrors
        ]

    @property
    def mirrors(self) -> list[Host]:
        """The mirrors that are still asked."""
        with self._lock:
            return list(self._mirrors)

    def close(self) -> None:
        """End all that is under way, in other threads too."""
        for host in (*self.mirrors, self.origin):
            host.close()
        self.connections.close()

    def first(self, read: Callable[[Host], T]) -> T:
        """Return the result of `read` for the first host that has it, the mirrors before the origin."""
        for host in self.mirrors:
            try:
                return read(host)
            except RekindleError as error:
                self.note(host, error)
        return read(self.origin)

    def note(self, mirror: Host, error: RekindleError) -> None:
        """Take note of an error of a mirror, which is not asked again unless it just lacks something.

        Raises the error again if the user has to correct something.
        """
        if isinstance(error, UsageError):
            raise error
        if not isinstance(error, NotFoundError):
            self._drop(mirror)

    def strike(self, host: object) -> None:
        """Take note that a connection broke: a mirror where that happens often is not asked again."""
        if not isinstance(host, Host) or host is self.origin:
            return
        with self._lock:
            count = self._strikes[host.name] = self._strikes.get(host.name, 0) + 1
        if count >= _STRIKES_LIMIT:
            self._drop(host)

    def _drop(self, mirror: Host) -> None:
        with self._lock:
            self._mirrors = [each for each in self._mirrors if each is not mirror]
