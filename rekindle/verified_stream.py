# SPDX-License-Identifier: Apache-2.0
"""The one stream for bytes that are checked while they are read."""

import hashlib
import io

from rekindle.digest import READ_BYTES, Digest
from rekindle.errors import IntegrityError

_HINT = "make the image again, or fetch it again"


class VerifiedStream(io.RawIOBase):
    """Gives the bytes of another stream, and checks that they are those of a digest.

    Never gives more than `size` bytes, and the last of them only once the digest has matched and the stream
    has ended: who has read to the end has what the digest names. Until then nothing is known, so write to
    where others do not look yet. Closes the other stream with itself. Belongs to one thread at a time.
    """

    def __init__(self, stream: io.RawIOBase, *, digest: Digest, size: int, name: str) -> None:
        """`name` is what errors call it."""
        super().__init__()
        self._stream = stream
        self._digest = digest
        self._name = name
        self._size = size
        self._hasher = hashlib.sha256()
        self._is_verified = False
        self._error: IntegrityError | None = None
        self.left = size  # bytes that were not given yet

    def readable(self) -> bool:
        return True

    def readinto(self, into: object, /) -> int:
        """Read some bytes; 0 at the end. Raises IntegrityError."""
        view = memoryview(into)[: self.left]  # type: ignore[arg-type]
        if self._error is not None:
            raise self._error
        if view:
            count = self._stream.readinto(view) or 0
            if not count:
                cause = f"{self._size - self.left} of {self._size} bytes came"
                raise self._refuse(f"{self._name} is cut off", cause)
            self._hasher.update(view[:count])
            self.left -= count
        else:
            count = 0
        if not self.left and not self._is_verified:
            self._verify()
        return count

    def fill(self, into: memoryview) -> None:
        """Read as much as there is room for, which must not be more than is left."""
        while into:
            into = into[self.readinto(into) :]

    def finish(self) -> None:
        """Read what is left. Raises IntegrityError unless all is as it should be."""
        buffer = memoryview(bytearray(min(READ_BYTES, self.left)))
        while self.readinto(buffer):
            pass

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.close()

    def _verify(self) -> None:
        if Digest.of_hash(self._hasher) != self._digest:
            raise self._refuse(f"the bytes of {self._name} are not those of its digest")
        if self._stream.read(1):
            raise self._refuse(f"{self._name} is longer than its descriptor says", f"{self._size} bytes")
        self._is_verified = True

    def _refuse(self, message: str, cause: str = "") -> IntegrityError:
        self._error = IntegrityError(message, cause=cause, hint=_HINT)
        return self._error
