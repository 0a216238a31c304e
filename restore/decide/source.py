# SPDX-License-Identifier: Apache-2.0
"""A verified image, and the way back to its blobs if a connection was cut."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from oci import resolve
from oci.image import Image
from oci.options import RegistryOptions
from oci.reference import Reference, RegistryReference
from oci.trust.verifier import Verified
from rekindle.home import Home

if TYPE_CHECKING:
    from oci.cache.image import CacheImage
    from oci.cache.inventory import StoredRoot
    from oci.progress import Tally
    from rekindle.cuda.search import Search
    from restore.decide.plan import Step


class Source:
    """What a restore reads from. `close` cuts its connections and gives up a driver that nobody took."""

    def __init__(
        self,
        image: Verified[Image],
        kernels: "Verified[CacheImage] | None",
        *,
        reference: Reference,
        home: Home,
        registry: RegistryOptions,
        tally: "Tally | None",
        cuda: "Search | None",
        connections: contextlib.ExitStack,
    ) -> None:
        """`kernels` is the kernel cache if its config was read. `tally` counts what is fetched, if anything
        can be; `cuda` is the driver that is starting; `connections` closes all of it."""
        self.image = image
        self.kernels = kernels
        self.tally = tally
        self.cuda = cuda
        self._reference = reference
        self._home = home
        self._registry = registry
        self._connections = connections

    def read_kernels(self) -> "Verified[CacheImage]":
        """Read the config of the kernel cache, if that was not done before. The image must have one."""
        if self.kernels is None:
            self.kernels = read_kernels(self.image)
        return self.kernels

    def roots(self, step: "Step") -> "list[StoredRoot]":
        """Return the roots of the kernel cache that a step needs."""
        return [root for root in self.read_kernels().value.inventory.roots if root.name in step.roots]

    def reconnect(self) -> None:
        """Connect to a registry again, after a try that failed and cut every connection. The digests stay."""
        if not isinstance(self._reference, RegistryReference):
            return
        from oci.registry.repository import Repository

        self._connections.close()
        access = resolve.access(self._registry, self._home)
        if self.tally is not None:
            access = dataclasses.replace(access, tally=self.tally)
        blobs = self._connections.enter_context(Repository(self._reference, access))
        self.image = self.image.fetched_from(blobs)
        if self.kernels is not None:
            self.kernels = self.kernels.fetched_from(blobs)

    def close(self) -> None:
        """Cut all connections. Idempotent."""
        self._connections.close()


def read_kernels(image: Verified[Image]) -> "Verified[CacheImage]":
    """Return the kernel cache of an image that has one: manifest and inventory. No layer is touched."""
    return image.map(_kernels_of)


def _kernels_of(image: Image) -> "CacheImage":
    from oci.cache import image as cache_image  # most restores need none

    assert image.cache is not None
    return cache_image.load(image.blobs, image.cache, image.limits)
