# SPDX-License-Identifier: Apache-2.0
"""A large file is told from another by parts of it, and not all of it is read."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.node import sampled

TENSORS, TENSOR_BYTES = 40, 100_000


def model(values: list[int], *, more: dict[str, object] | None = None) -> bytes:
    header: dict[str, object] = dict(more or {})
    for number in range(len(values)):
        start = number * TENSOR_BYTES
        header[f"t{number}"] = {"dtype": "U8", "data_offsets": [start, start + TENSOR_BYTES]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(bytes([v]) * TENSOR_BYTES for v in values)


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * sampled.WHOLE_BYTES)
    wanted = hashlib.sha256(b"x" * sampled.WHOLE_BYTES).hexdigest()
    assert sampled.identity(tmp_path / "file") == f"sha256:{wanted}"


@pytest.mark.parametrize("number", range(TENSORS))
def test_no_tensor_can_change(number: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(model([7] * TENSORS))
    (tmp_path / "b").write_bytes(model([7] * number + [8] + [7] * (TENSORS - number - 1)))
    assert sampled.identity(tmp_path / "a").startswith("sampled:")
    assert sampled.identity(tmp_path / "a") != sampled.identity(tmp_path / "b")


def test_no_header_can_change(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(model([7] * TENSORS, more={"__metadata__": {"a": "1"}}))
    (tmp_path / "b").write_bytes(model([7] * TENSORS, more={"__metadata__": {"a": "2"}}))
    assert sampled.identity(tmp_path / "a") != sampled.identity(tmp_path / "b")


@pytest.mark.parametrize("at", [0, 1 << 20, (2 << 20) - 1])
def test_another_file_has_other_pages(at: int, tmp_path: Path) -> None:
    size = 2 << 20  # a page in two, and the edges
    (tmp_path / "a").write_bytes(bytes(size))
    content = bytearray(size)
    content[at] = 1
    (tmp_path / "b").write_bytes(content)
    assert sampled.identity(tmp_path / "a") != sampled.identity(tmp_path / "b")


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    assert sampled.identity(path).startswith("sampled:")


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "a header that is longer than the file": lambda _: struct.pack("<Q", 1 << 63) + b"{",
    "tensors beyond the end": lambda _: model([1]).replace(b"[0, 100000]", b"[0, 999999999999999999]"),
    "tensors that end before they begin": lambda _: model([1]).replace(b"[0, 100000]", b"[99999, 1]"),
    "no header": lambda _: struct.pack("<Q", 0) + b"{",
    "a header without an end": lambda content: content[:30],
    "many tensors": lambda _: model([]).replace(b"{}", b"{" + b'"data_offsets":[1,2]' * 100_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_header_does_harm(name: str, tmp_path: Path) -> None:
    content = HOSTILE[name](model([7] * 3))
    (tmp_path / "file").write_bytes(content + bytes(max(0, (2 << 20) - len(content))))
    assert sampled.identity(tmp_path / "file").startswith("sampled:")


@given(st.binary(max_size=64))
def test_no_beginning_does_harm(tmp_path_factory: pytest.TempPathFactory, head: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(head + os.urandom(8) + bytes(2 << 20))
    assert sampled.identity(path) == sampled.identity(path)


@pytest.mark.parametrize("read", [sampled.identity, sampled.short_digest])
@pytest.mark.parametrize("path", ["/dev/zero", "/", "/nothing", "/dev/tty", "/proc/self/mem"])
def test_what_is_no_file_is_neither_read_nor_waited_for(path: str, read: Callable[[str], str]) -> None:
    with pytest.raises(OSError):
        read(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        sampled.identity(tmp_path / "pipe")


def test_a_short_digest_is_of_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert sampled.short_digest(str(tmp_path / "file")) == hashlib.sha256(b"x").hexdigest()[:16]
    (tmp_path / "file").write_bytes(bytes(sampled.WHOLE_BYTES + 1))
    with pytest.raises(OSError, match="too large"):
        sampled.short_digest(str(tmp_path / "file"))
