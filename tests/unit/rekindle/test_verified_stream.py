# SPDX-License-Identifier: Apache-2.0
"""The stream that checks what is read from it: nobody gets to its end with other bytes."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.digest import Digest
from rekindle.errors import IntegrityError
from rekindle.verified_stream import VerifiedStream


class Pieces(io.RawIOBase):
    """A stream that gives so many bytes at a time, as connections do."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__()
        self._left = content
        self._most = most

    def readable(self) -> bool:
        return True

    def readinto(self, into: object, /) -> int:
        view = memoryview(into)  # type: ignore[arg-type]
        count = min(len(view), self._most, len(self._left))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count


def opened(stream: io.RawIOBase, content: bytes) -> VerifiedStream:
    return VerifiedStream(stream, digest=Digest.of_bytes(content), size=len(content), name="blob x")


def read_all(stream: VerifiedStream, room: int, out: bytearray) -> bytearray:
    """Reads to the end, or to an error; `out` has what came until then."""
    buffer = memoryview(bytearray(room))
    while count := stream.readinto(buffer):
        out += buffer[:count]
    return out


@given(st.binary(max_size=300), st.integers(1, 400), st.integers(1, 400))
def test_the_right_bytes_come_whole(content: bytes, most: int, room: int) -> None:
    stream = opened(Pieces(content, most), content)
    assert read_all(stream, room, bytearray()) == content
    assert stream.left == stream.readinto(bytearray(1)) == 0


@pytest.mark.parametrize("room", [1, 7, 1000])
@pytest.mark.parametrize(
    ("given_bytes", "word"),
    [
        (b"0123456789", ""),
        (b"", "truncated"),
        (b"012345678", "truncated"),
        (b"0123456780", "does not match its digest"),
        (b"x123456789", "does not match its digest"),
        (b"0123456789x", "longer"),
        (b"0123456789" * 100, "longer"),
    ],
)
def test_the_last_bytes_come_only_if_all_are_right(given_bytes: bytes, word: str, room: int) -> None:
    content = b"0123456789"
    stream = opened(Pieces(given_bytes, 4), content)
    came, buffer = bytearray(), bytearray(room)
    if not word:
        assert read_all(stream, room, bytearray()) == content
        return
    with pytest.raises(IntegrityError, match=word) as raised:
        read_all(stream, room, came)
    assert len(came) < len(content)
    assert raised.value.hint
    for _ in range(2):  # and it stays so
        with pytest.raises(IntegrityError, match=word):
            stream.readinto(buffer)
        with pytest.raises(IntegrityError, match=word):
            stream.finish()


@pytest.mark.parametrize("given_bytes", [b"x", b"xyz"])
def test_an_empty_blob_is_checked_as_well(given_bytes: bytes) -> None:
    with pytest.raises(IntegrityError, match="longer"):
        opened(Pieces(given_bytes, 1), b"").readinto(bytearray(10))
    with pytest.raises(IntegrityError, match="longer"):
        opened(Pieces(given_bytes, 1), b"").finish()
    opened(Pieces(b"", 1), b"").finish()


def test_no_more_is_asked_for_than_its_size() -> None:
    asked = []

    class Endless(io.RawIOBase):
        def readinto(self, into: object, /) -> int:
            asked.append(len(memoryview(into)))  # type: ignore[arg-type]
            return asked[-1]

    with pytest.raises(IntegrityError):
        opened(Endless(), bytes(10)).finish()
    assert asked == [10, 1]


def test_what_is_left_can_be_read_at_once() -> None:
    stream = opened(Pieces(b"0123456789", 3), b"0123456789")
    into = bytearray(5)
    stream.fill(memoryview(into))
    assert (bytes(into), stream.left) == (b"01234", 5)
    assert stream.readinto(bytearray()) == 0
    stream.finish()
    assert stream.left == 0


def test_errors_of_the_other_stream_pass_through_and_it_is_closed_with_ours() -> None:
    class Broken(Pieces):
        def readinto(self, into: object, /) -> int:
            raise ConnectionResetError

    inner = Broken(b"", 1)
    with pytest.raises(ConnectionResetError), opened(inner, b"abc") as stream:
        stream.finish()
    assert inner.closed
