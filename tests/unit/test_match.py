# SPDX-License-Identifier: Apache-2.0
"""Which differences forbid the process rung, and which are only told."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.errors import MismatchError
from rekindle.record import MappedFile
from rekindle.report import Reason, Rung
from restore.match import match, require, size_here
from tests.unit.samples import NODE, RECORD


def differences(**changes: Any) -> list[Reason]:
    """The reasons on a node that is the recorded one but for some facts; every file is as recorded."""
    sizes = {file.path: file.size for file in RECORD.mapped_files}
    return match(RECORD, dataclasses.replace(NODE, **changes), sizes.get)


CASES: dict[str, tuple[dict[str, object], list[tuple[str, str, str, bool]]]] = {
    "the same node": ({}, []),
    "another name of the processor": ({"cpu_model": "Other CPU"}, []),
    "more features": ({"cpu_features": NODE.cpu_features | {"amx_tile", "new"}}, []),
    "one feature less": (
        {"cpu_features": NODE.cpu_features - {"avx512f"}},
        [("cpu-feature", "avx512f", "missing on Example CPU", True)],
    ),
    "no feature": (
        {"cpu_features": frozenset()},
        [("cpu-feature", "avx2 avx512f fpu", "missing on Example CPU", True)],
    ),
    "one more and one less": (
        {"cpu_features": frozenset({"avx2", "fpu", "new"}), "cpu_model": "Other CPU"},
        [("cpu-feature", "avx512f", "missing on Other CPU", True)],
    ),
    "another architecture": (
        {"architecture": "aarch64"},
        [("architecture", "x86_64", "aarch64", True)],
    ),
    "larger pages": ({"page_bytes": 65536}, [("page-size", "4096", "65536", True)]),
    "another kernel": ({"kernel": "6.9.0"}, [("kernel", "6.8.0", "6.9.0", False)]),
    "everything": (
        {"architecture": "aarch64", "page_bytes": 65536, "kernel": "6.9.0", "cpu_features": frozenset()},
        [
            ("architecture", "x86_64", "aarch64", True),
            ("page-size", "4096", "65536", True),
            ("cpu-feature", "avx2 avx512f fpu", "missing on Example CPU", True),
            ("kernel", "6.8.0", "6.9.0", False),
        ],
    ),
}


@pytest.mark.parametrize(("changes", "wanted"), CASES.values(), ids=CASES)
def test_a_node_differs_in(changes: dict[str, object], wanted: list[tuple[str, str, str, bool]]) -> None:
    reasons = differences(**changes)
    assert [(r.code, r.recorded, r.here, r.hard) for r in reasons] == wanted
    assert all(reason.rung is Rung.PROCESS for reason in reasons)


FILE_CASES: dict[str, tuple[Callable[[str], int | None], list[tuple[str, str]]]] = {
    "same size": (lambda path: 10, []),
    "larger": (lambda path: 11, [("/lib/a", "11 bytes"), ("/lib/b", "11 bytes")]),
    "empty": (lambda path: 0, [("/lib/a", "0 bytes"), ("/lib/b", "0 bytes")]),
    "missing": (lambda path: None, [("/lib/a", "missing"), ("/lib/b", "missing")]),
    "one of them": ({"/lib/a": 10}.get, [("/lib/b", "missing")]),
}


@pytest.mark.parametrize(("size_of", "wanted"), FILE_CASES.values(), ids=FILE_CASES)
def test_a_file_differs_in(size_of: Callable[[str], int | None], wanted: list[tuple[str, str]]) -> None:
    files = [MappedFile(path="/lib/a", size=10), MappedFile(path="/lib/b", size=10)]
    reasons = match(dataclasses.replace(RECORD, mapped_files=files), NODE, size_of)
    assert [(r.field, r.here) for r in reasons] == wanted
    assert all(r.code == "rootfs-file" and r.hard and r.recorded == "10 bytes" for r in reasons)


def test_soft_reasons_forbid_nothing() -> None:
    require(RECORD, [])
    require(RECORD, differences(kernel="6.9.0"))


def test_a_hard_reason_forbids_the_process() -> None:
    with pytest.raises(MismatchError) as caught:
        require(RECORD, differences(kernel="6.9.0", architecture="aarch64"))
    assert caught.value.cause == "architecture: architecture was x86_64, is aarch64"
    assert "Example CPU" in caught.value.hint
    assert caught.value.descends


def test_a_long_list_of_reasons_is_cut() -> None:
    files = [MappedFile(path=f"/lib/{number}", size=1) for number in range(30)]
    reasons = match(dataclasses.replace(RECORD, mapped_files=files), NODE, lambda _: None)
    assert len(reasons) == 30
    with pytest.raises(MismatchError) as caught:
        require(RECORD, reasons)
    lines = caught.value.cause.splitlines()
    assert len(lines) == 13
    assert lines[-1] == "and 18 more"


def test_the_size_of_a_file_here(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert size_here(str(tmp_path / "file")) == 5
    assert size_here(str(tmp_path / "link")) == 5
    assert size_here(str(tmp_path / "none")) is None
    assert size_here(str(tmp_path / "file/below")) is None
