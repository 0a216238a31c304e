# SPDX-License-Identifier: Apache-2.0
"""Timers of a dump that had expired, and whose expiry no process had read."""

from pathlib import Path

import pytest

from rekindle.criu.image_files import FILES_MAGIC, read_messages, write_messages
from rekindle.criu.protobuf import Field, encode_fields, read_fields
from rekindle.criu.timers import rearm

OTHER = encode_fields([(1, 0, 1), (2, 0, 7), (3, 2, b"\x08\x07")])


def timer(*, left: tuple[int, int], every: tuple[int, int], ticks: int = 1) -> bytes:
    """An entry as CRIU 4.2.1 writes it: its number, flags, owner, clock, ticks, and how it was set."""
    inner: list[Field] = [(1, 0, 39), (2, 0, 2050), (3, 2, b"\x08\x00"), (4, 0, 1), (5, 0, ticks), (6, 0, 0)]
    inner += [(7, 0, left[0]), (8, 0, left[1]), (9, 0, every[0]), (10, 0, every[1])]
    return encode_fields([(1, 0, 17), (2, 0, 39), (12, 2, encode_fields(inner))])


def rearmed(tmp_path: Path, *messages: bytes) -> list[bytes]:
    path = tmp_path / "files.img"
    write_messages(path, FILES_MAGIC, messages)
    rearm(tmp_path)
    return list(read_messages(path, FILES_MAGIC))


def times(message: bytes) -> dict[int, object]:
    (inner,) = [value for number, _, value in read_fields(message, Path("x")) if number == 12]
    assert isinstance(inner, bytes)
    return {number: value for number, _, value in read_fields(inner, Path("x"))}


@pytest.mark.parametrize("every", [(0, 300_000_000), (5, 0)])
def test_an_expired_periodic_timer_runs_on(tmp_path: Path, every: tuple[int, int]) -> None:
    expired = timer(left=(0, 0), every=every)
    first, second = rearmed(tmp_path, OTHER, expired)
    assert first == OTHER
    assert times(second) == {**times(expired), 7: every[0], 8: every[1]}


@pytest.mark.parametrize(
    "message",
    [
        timer(left=(0, 5), every=(0, 300_000_000), ticks=0),
        timer(left=(0, 0), every=(0, 0)),  # it has run once, or was never set
        OTHER,
    ],
)
def test_another_timer_stays_as_it_is(tmp_path: Path, message: bytes) -> None:
    assert rearmed(tmp_path, message) == [message]
