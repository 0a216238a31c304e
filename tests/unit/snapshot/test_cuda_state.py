# SPDX-License-Identifier: Apache-2.0
"""How much memory there is for what is on GPUs, and whether a dump can hold it."""

from pathlib import Path

import psutil
import pytest

from rekindle.errors import DumpError
from snapshot.cuda_state import CudaState, available_bytes, require_state

GIB = 1 << 30


@pytest.fixture(autouse=True)
def of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node has 10 GiB free, whatever the control groups say."""
    memory = psutil.virtual_memory()._replace(available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def groups_of(place: Path, group: str = "0::/a/b\n") -> tuple[Path, Path]:
    """The files that say which control groups we are in."""
    (place / "cgroup").write_text(group)
    (place / "groups/a/b").mkdir(parents=True)
    return place / "cgroup", place / "groups"


def limit(directory: Path, most: object, current: object, inactive: object = 0) -> None:
    (directory / "memory.max").write_text(f"{most}\n")
    (directory / "memory.current").write_text(f"{current}\n")
    (directory / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")


def test_without_a_limit_it_is_what_the_node_has(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path)
    assert available_bytes(own, cgroups) == 10 * GIB
    limit(cgroups / "a/b", "max", 5 * GIB)
    assert available_bytes(own, cgroups) == 10 * GIB


@pytest.mark.parametrize("directory", ["a/b", "a", ""])
def test_a_limit_on_any_group_that_we_are_in_counts(tmp_path: Path, directory: str) -> None:
    own, cgroups = groups_of(tmp_path)
    limit(cgroups / directory, 4 * GIB, 3 * GIB, GIB // 2)
    assert available_bytes(own, cgroups) == GIB + GIB // 2


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path)
    limit(cgroups, 9 * GIB, 0)
    limit(cgroups / "a", 8 * GIB, 2 * GIB)
    limit(cgroups / "a/b", 7 * GIB, 0)
    assert available_bytes(own, cgroups) == 6 * GIB


def test_in_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path, "0::/\n")
    limit(cgroups, 2 * GIB, GIB)
    assert available_bytes(own, cgroups) == GIB


def test_nothing_is_less_than_none(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path)
    limit(cgroups / "a/b", GIB, 2 * GIB)
    assert available_bytes(own, cgroups) == 0


@pytest.mark.parametrize("group", ["", "4:memory:/a/b\n0::/gone\n", "4:memory:/a/b\n"])
def test_groups_that_tell_nothing_are_no_limit(tmp_path: Path, group: str) -> None:
    own, cgroups = groups_of(tmp_path, group)
    limit(cgroups / "a/b", GIB, GIB)
    (cgroups / "a/memory.max").write_text("no number")
    assert available_bytes(own, cgroups) == 10 * GIB


def test_this_node_tells() -> None:
    assert available_bytes() > 0


@pytest.mark.parametrize(
    ("pids", "gpus", "device", "host", "dump", "lacks"),
    [
        (0, 0, 0, 0, 0, False),
        (1, 1, 28 * GIB, 0, int(4.4 * GIB), True),  # as NvSnap met it
        (1, 1, 28 * GIB, 4 * GIB, 31 * GIB, False),
        (1, 1, 28 * GIB, 4 * GIB, 31 * GIB - 1, True),
        (1, 1, 28 * GIB, 30 * GIB, 30 * GIB, True),  # all that is in it can be of the host's memory
        (2, 1, 28 * GIB, 0, 26 * GIB, False),
        (8, 8, 640 * GIB, 0, 576 * GIB, False),
        (1, 0, 2 * GIB, 0, GIB, False),
        (1, 1, 0, GIB, 0, False),  # nobody tells what is on the GPU: it may be little
        (1, 1, 100 << 20, 100 << 20, 50 << 20, False),
    ],
)
def test_a_dump_must_have_room_for_what_was_held(
    pids: int, gpus: int, device: int, host: int, dump: int, lacks: bool
) -> None:
    state = CudaState(
        pids=range(pids), gpus=[str(n) for n in range(gpus)], device_bytes=device, host_bytes=host
    )
    if lacks:
        with pytest.raises(DumpError, match="lacks the state of the GPU"):
            require_state(state, dump)
    else:
        require_state(state, dump)
