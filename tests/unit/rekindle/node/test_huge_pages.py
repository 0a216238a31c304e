# SPDX-License-Identifier: Apache-2.0
"""Huge pages that processes have mapped, by smaps as Linux 6.8 prints it, and those that are free."""

from pathlib import Path

import pytest

from rekindle.node.huge_pages import HugePages, available, of_smaps

SMALL = """7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me ac
"""


def mapping(start: int, pages: int, *, offset: int = 0, inode: int = 77, kib: int = 2048) -> str:
    end = start + pages * kib * 1024
    return f"""{start:x}-{end:x} rw-p {offset:08x} 00:0f {inode}      /anon_hugepage (deleted)
Size:           {pages * kib:8} kB
KernelPageSize: {kib:8} kB
MMUPageSize:    {kib:8} kB
Private_Hugetlb:       0 kB
VmFlags: rd wr mr mw me de ht
"""


def test_a_process_without_any_has_none() -> None:
    assert of_smaps([SMALL, ""]) == ()


def test_those_of_every_size_are_counted() -> None:
    text = mapping(0x7F0000000000, 3) + SMALL + mapping(0x7E0000000000, 1, inode=78, kib=1 << 20)
    found = of_smaps([text])
    assert found == (HugePages(page_bytes=2 << 20, pages=3), HugePages(page_bytes=1 << 30, pages=1))


def test_what_processes_share_is_counted_once() -> None:
    first, second = mapping(0x7F0000000000, 3), mapping(0x7A0000000000, 2, offset=4 << 20)
    (found,) = of_smaps([first, second, mapping(0x7F0000000000, 3, inode=90)])
    assert found.pages == 4 + 3


@pytest.mark.parametrize(("free", "reserved", "expected"), [(8, 3, 5), (0, 0, 0), (2, 3, 0)])
def test_reserved_ones_are_not_free(tmp_path: Path, free: int, reserved: int, expected: int) -> None:
    pool = tmp_path / "hugepages-2048kB"
    pool.mkdir()
    for name, value in {"free": free, "resv": reserved, "nr_overcommit": 0, "surplus": 0}.items():
        (pool / f"{name}_hugepages").write_text(f"{value}\n")
    assert available(tmp_path)[2 << 20] == expected
    (pool / "nr_overcommit_hugepages").write_text("4\n")
    assert available(tmp_path)[2 << 20] == expected + 4


def test_a_kernel_without_huge_pages_has_none(tmp_path: Path) -> None:
    assert not available(tmp_path / "none")


def test_a_pod_is_allowed_as_many_as_it_asked_for(tmp_path: Path) -> None:
    pool, own, pod = tmp_path / "pools/hugepages-2048kB", tmp_path / "cgroup", tmp_path / "groups/pod"
    for directory in (pool, pod / "server"):
        directory.mkdir(parents=True)
    for name, value in {"free": 100, "resv": 0, "nr_overcommit": 0, "surplus": 0}.items():
        (pool / f"{name}_hugepages").write_text(f"{value}\n")
    own.write_text("0::/pod/server\n")

    def here() -> int:
        return available(tmp_path / "pools", own, tmp_path / "groups")[2 << 20]

    assert here() == 100
    (pod / "hugetlb.2MB.max").write_text(f"{8 << 20}\n")
    (pod / "hugetlb.2MB.current").write_text(f"{2 << 20}\n")
    assert here() == 3
    (pod / "server/hugetlb.2MB.rsvd.max").write_text("0\n")
    (pod / "server/hugetlb.2MB.rsvd.current").write_text("0\n")
    assert here() == 0
