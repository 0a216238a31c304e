# SPDX-License-Identifier: Apache-2.0
"""The order to a filler, and the places that it shares with restores.

dumps/HEX.lazy/
    tree/       the dump, as far as it is here; it becomes dumps/HEX
    mount/      where the filler shows the memory files, to itself alone
    socket      where restores connect
dumps/HEX.lazy.lock     held by the filler as long as it lives
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from oci.options import RegistryOptions

MESSAGE_BYTES = 64 << 10


class Order(Struct, frozen=True, kw_only=True):
    """An image, where its blobs are, and where it goes.

    `image` is what `Image.to_json` gives, as text. `socket` is a descriptor that is connected to the restore,
    `kept` are others that the filler holds, such as that of its lock.
    """

    home: str
    directory: str
    image: str
    reference: str
    registry: RegistryOptions
    socket: int
    kept: tuple[int, ...]

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def read(cls, content: bytes) -> "Order":
        return msgspec.json.decode(content, type=cls)


class Places(NamedTuple):
    """The places in the directory of a filler."""

    directory: Path

    @property
    def tree(self) -> Path:
        return self.directory / "tree"

    @property
    def mount(self) -> Path:
        return self.directory / "mount"

    @property
    def socket(self) -> Path:
        return self.directory / "socket"

    @property
    def lock(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.lock")

    @contextlib.contextmanager
    def short(self) -> Iterator[str]:
        """Yield a short path of the directory: the address of a socket has 107 bytes at most."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
