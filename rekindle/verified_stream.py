# SPDX-License-Identifier: Apache-2.0
"""A stream that checks the digest and size of its bytes while they are read."""

import hashlib
import io

from rekindle.digest import READ_BYTES, Digest
from rekindle.errors import IntegrityError

_HINT = "fetch the image again, or create it again"


class VerifiedStream(io.RawIOBase):
    """The bytes of another stream, checked against a digest.

    Returns at most `size` bytes, and the last of them only after the digest has matched and the other stream
    has ended, so a reader that reaches the end has the right bytes. Until then they are unverified: write
    them where no other process reads yet. Closes the other stream with itself. Not thread-safe.
    """

    def __init__(self, stream: io.RawIOBase, *, digest: Digest, size: int, name: str) -> None:
        """Wrap a stream; errors call it `name`."""
        super().__init__()
        self._stream = stream
        self._digest = digest
        self._name = name
        self._size = size
        self._hasher = hashlib.sha256()
        self._is_verified = False
        self._error: IntegrityError | None = None
        self.left = size  # the number of bytes not returned yet

    def readable(self) -> bool:
        return True

    def readinto(self, into: object, /) -> int:
        """Read some bytes and return their number, 0 at the end. Raises IntegrityError."""
        view = memoryview(into)[: self.left]  # type: ignore[arg-type]
        if self._error is not None:
            raise self._error
        if view:
            count = self._stream.readinto(view) or 0
            if not count:
                cause = f"it ended after {self._size - self.left} of {self._size} bytes"
                raise self._refuse(f"{self._name} is truncated", cause)
            self._hasher.update(view[:count])
            self.left -= count
        else:
            count = 0
        if not self.left and not self._is_verified:
            self._verify()
        return count

    def fill(self, into: memoryview) -> None:
        """Fill a buffer, which must not be larger than `left`. Raises IntegrityError."""
        while into:
            into = into[self.readinto(into) :]

    def finish(self) -> None:
        """Read the rest. Raises IntegrityError unless size and digest are right."""
        buffer = memoryview(bytearray(min(READ_BYTES, self.left)))
        while self.readinto(buffer):
            pass

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.close()

    def _verify(self) -> None:
        if Digest.of_hash(self._hasher) != self._digest:
            raise self._refuse(f"{self._name} does not match its digest")
        if self._stream.read(1):
            raise self._refuse(f"{self._name} is longer than its descriptor says", f"{self._size} bytes")
        self._is_verified = True

    def _refuse(self, message: str, cause: str = "") -> IntegrityError:
        self._error = IntegrityError(message, cause=cause, hint=_HINT)
        return self._error
