# SPDX-License-Identifier: Apache-2.0
"""A verified image, its kernel cache and its connections, which can be opened again."""

import contextlib
from typing import TYPE_CHECKING

from msgspec import structs

from oci import image as images
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
    """The sources of a restore. `close` ends its connections, and a driver that has not been used."""

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
        prefetch: contextlib.ExitStack | None,
        connections: contextlib.ExitStack,
    ) -> None:
        """Hold an image and what it is read with.

        `kernels` is the kernel cache, if its config was read. `tally` counts fetched bytes; None for a local
        image. `cuda` is the driver that is starting; `prefetch` reads ahead what a restored process needs,
        until it is closed. `connections` closes everything.
        """
        self.image = image
        self.kernels = kernels
        self.tally = tally
        self.cuda = cuda
        self.prefetch = prefetch
        self._neutral: Verified[Image] | None = None
        self.reference = reference
        self._home = home
        self._registry = registry
        self._connections = connections

    def read_kernels(self) -> "Verified[CacheImage]":
        """Return the kernel cache; read its config the first time. The image must have one."""
        if self.kernels is None:
            self.kernels = read_kernels(self.image)
        return self.kernels

    def read_neutral(self) -> Verified[Image]:
        """Return the neutral process; read its record the first time. The image must have one."""
        if self._neutral is None:
            self._neutral = self.image.map(images.load_neutral)
        return self._neutral

    def roots(self, step: "Step") -> "list[StoredRoot]":
        """Return the roots of the kernel cache that a step needs."""
        return [root for root in self.read_kernels().value.inventory.roots if root.name in step.roots]

    def reconnect(self) -> None:
        """Connect to the registry again after a failed rung, for the same digests."""
        if not isinstance(self.reference, RegistryReference):
            return
        from oci.registry.repository import Repository

        self._connections.close()
        access = resolve.access(self._registry, self._home)
        if self.tally is not None:
            access = structs.replace(access, tally=self.tally)
        blobs = self._connections.enter_context(Repository(self.reference, access))
        self.image = self.image.fetched_from(blobs)
        if self._neutral is not None:
            self._neutral = self._neutral.fetched_from(blobs)
        if self.kernels is not None:
            self.kernels = self.kernels.fetched_from(blobs)

    def close(self) -> None:
        """End all connections. Idempotent."""
        self._connections.close()


def read_kernels(image: Verified[Image]) -> "Verified[CacheImage]":
    """Return the manifest and inventory of an image's kernel cache. Fetches no layer."""
    return image.map(_kernels_of)


def _kernels_of(image: Image) -> "CacheImage":
    from oci.cache import image as cache_image  # imported late: most restores do not need it

    assert image.cache is not None
    return cache_image.load(image.blobs, image.cache, image.limits)
