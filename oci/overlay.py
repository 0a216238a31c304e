# SPDX-License-Identifier: Apache-2.0
"""Read blobs from a layout, or from another place if the layout does not have them."""

import io

from oci.descriptor import Blobs, Descriptor
from oci.layout import Layout
from rekindle.digest import Digest


class Overlay:
    """The blobs of a new image: in a layout, except for those that it shares with an older image."""

    def __init__(self, layout: Layout, below: Blobs) -> None:
        self._layout, self._below = layout, below

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """See `Blobs`."""
        return self._place(descriptor).read(descriptor, limit_bytes=limit_bytes)

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        """See `Blobs`."""
        return self._place(descriptor).open_blob(descriptor)

    def referrers(self, digest: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        """See `Blobs`."""
        return self._layout.referrers(digest, artifact_type=artifact_type)

    def cancel(self) -> None:
        """See `Blobs`."""
        self._below.cancel()

    def fall_back_to_origin(self) -> bool:
        """See `Blobs`."""
        return self._below.fall_back_to_origin()

    def _place(self, descriptor: Descriptor) -> Blobs:
        return self._layout if self._layout.contains(descriptor) else self._below
