# SPDX-License-Identifier: Apache-2.0
"""A digest has one form, and is of the bytes."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.digest import READ_BYTES, Digest

EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_nothing_has_its_known_digest(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Digest.of_bytes(b"") == EMPTY
    assert Digest.of_file(tmp_path / "file") == EMPTY


def test_a_digest_is_text() -> None:
    digest = Digest.parse(EMPTY)
    assert isinstance(digest, str)
    assert f"{digest}" == EMPTY
    assert json.dumps({digest: digest}) == f'{{"{EMPTY}": "{EMPTY}"}}'
    assert digest.hex == EMPTY.removeprefix("sha256:")
    assert len({digest, Digest.of_bytes(b""), EMPTY}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "sha256:" + "0" * 63,
        "sha256:" + "0" * 65,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "sha256:" + "\u0660" * 64,
        "sha256:" + "0" * 64 + "\n",
        " sha256:" + "0" * 64,
        "SHA256:" + "0" * 64,
        "sha512:" + "0" * 128,
        "sha256-" + "0" * 64,
        "0" * 64,
        "sha256:../" + "0" * 61,
    ],
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a sha256 digest"):
        Digest.parse(text)


def test_a_long_text_is_not_repeated_whole() -> None:
    with pytest.raises(ValueError) as caught:
        Digest.parse("x" * 100_000)
    assert len(str(caught.value)) < 200


@given(st.binary(max_size=200))
def test_a_digest_is_of_the_bytes(content: bytes) -> None:
    digest = Digest.of_bytes(content)
    assert digest == "sha256:" + hashlib.sha256(content).hexdigest()
    assert Digest.parse(digest) == digest


@pytest.mark.parametrize("size", [1, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES + 7])
def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert Digest.of_file(tmp_path / "file") == Digest.of_bytes(content[:size])


def test_a_stream_has_the_digest_of_what_is_left_to_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"read already, and not yet")
    with open(tmp_path / "file", "rb", buffering=0) as file:
        file.read(len(b"read already, "))
        assert Digest.of_stream(file) == Digest.of_bytes(b"and not yet")
        assert Digest.of_stream(file) == EMPTY
