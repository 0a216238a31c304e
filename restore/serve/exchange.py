# SPDX-License-Identifier: Apache-2.0
"""Tell whether an HTTP/1.1 connection waits for an answer, from few of its bytes.

Of each answer, the beginning is kept, the length of all that came, and the last bytes. That costs next to
nothing, so it is done for every connection, and the head is only read once somebody wants to know. It is a
guess where a client sends a request before the last one was answered, or where data in chunks look like the
last chunk; no answer depends on it.
"""

import re

_HEAD_LIMIT_BYTES = 4 << 10
_LAST_CHUNK = b"0\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked[ \t]*\r\n", re.IGNORECASE)


class Exchange:
    """The last request of a connection, and what has come of its answer."""

    __slots__ = ("_asked", "_head", "_received_bytes", "_tail")

    def __init__(self) -> None:
        self._asked, self._head, self._tail, self._received_bytes = b"", bytearray(), b"", 0

    def from_client(self, content: bytes) -> None:
        """Note what the client has sent."""
        if self._received_bytes or not self._asked:
            self._asked, self._head, self._tail, self._received_bytes = content[:5], bytearray(), b"", 0

    def from_server(self, content: bytes) -> None:
        """Note what the server has sent."""
        if len(self._head) < _HEAD_LIMIT_BYTES:
            self._head += content[:_HEAD_LIMIT_BYTES]
        self._received_bytes += len(content)
        self._tail = (self._tail + content[-5:])[-5:]

    @property
    def is_half_answered(self) -> bool:
        """Whether an answer has begun and not ended."""
        return bool(self._received_bytes) and self.is_open

    @property
    def is_replaceable(self) -> bool:
        """Whether the server would go on with the next request over another connection.

        One that speaks first has a protocol that we do not know.
        """
        return not self.is_open and (bool(self._asked) or not self._received_bytes)

    def _final(self) -> bytes:
        """Return what was kept from the start of the final answer on, after those like 100 (Continue)."""
        rest = bytes(self._head)
        while (found := _STATUS.match(rest)) and found[1][:1] == b"1" and found[1] != b"101":
            rest = rest.partition(b"\r\n\r\n")[2]
        return rest

    @property
    def is_open(self) -> bool:
        """Whether a request has not been answered, or not to the end."""
        if not self._asked:
            return False
        rest = self._final()
        status = _STATUS.match(rest)
        head, end, _ = rest.partition(b"\r\n\r\n")
        if status is None or not end or status[1] == b"101":
            return True
        head += b"\r\n"
        if self._asked == b"HEAD " or status[1] in {b"204", b"304"}:
            return False
        if _CHUNKED.search(head):
            return self._tail != _LAST_CHUNK
        if length := _LENGTH.search(head):
            before = len(self._head) - len(rest)
            return self._received_bytes < before + len(head) + 2 + int(length[1])
        return True  # until the connection ends
