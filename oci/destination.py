# SPDX-License-Identifier: Apache-2.0
"""A place to copy images to."""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from oci.descriptor import BlobSource, Descriptor
from rekindle.digest import Digest


class Node(Struct, frozen=True, kw_only=True):
    """A manifest or index of an image, with the bytes to store."""

    descriptor: Descriptor
    content: bytes


class Destination(Protocol):
    """A place to copy images to: a layout, or a repository of a registry."""

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob or manifest is there already."""

    def mount(self, descriptor: Descriptor) -> bool:
        """Take a blob from another repository of the destination. False if it must be uploaded."""

    def upload(self, descriptor: Descriptor, source: BlobSource) -> None:
        """Copy a blob. It appears when all of it was received and its digest matched."""

    def put_manifest(self, content: bytes, media_type: str, name: str | None = None) -> Digest:
        """Store a manifest under its digest or a tag. Everything that it lists must be there."""

    def tagged(self, tag: str) -> Descriptor | None:
        """Return the manifest under a tag; None if there is none."""

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """See `Blobs.read`."""

    def keep(self, tag: str, write_again: Callable[[], bool]) -> None:
        """Let `settle` call `write_again` until that says that others have replaced nothing under a tag."""

    def settle(self) -> None:
        """Make sure that what was attached stays, also if others attach something now."""

    def cancel(self) -> None:
        """Abort the transfers of other threads, where they could take long."""
