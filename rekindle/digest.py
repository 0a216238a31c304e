# SPDX-License-Identifier: Apache-2.0
"""Content digests in the form of the OCI image specification: `sha256:<64 hex digits>`."""

import hashlib
import io
import re
from pathlib import Path
from typing import Self

_FORM = re.compile(r"sha256:[0-9a-f]{64}")
READ_BYTES = 1 << 20  # reading and hashing get no faster with larger buffers


class Digest(str):
    """A well-formed sha256 digest. Other algorithms are rejected: rekindle never writes them."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check a digest in text. Raises ValueError unless it is a sha256 digest in canonical form."""
        if not _FORM.fullmatch(text):
            raise ValueError(f"not a sha256 digest: {text[:80]!r}")
        return cls(text)

    @classmethod
    def of_bytes(cls, content: bytes) -> Self:
        return cls.of_hash(hashlib.sha256(content))

    @classmethod
    def of_hash(cls, hasher: "hashlib._Hash") -> Self:
        """Return the digest that a sha256 hasher has computed."""
        return cls("sha256:" + hasher.hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Self:
        with open(path, "rb", buffering=0) as file:
            return cls.of_stream(file)

    @classmethod
    def of_stream(cls, stream: io.RawIOBase) -> Self:
        """Read a stream to its end and return the digest, with a buffer of READ_BYTES."""
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(READ_BYTES))
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
        return cls.of_hash(hasher)

    @property
    def hex(self) -> str:
        return self.removeprefix("sha256:")
