# SPDX-License-Identifier: Apache-2.0
"""What a process takes from a node is compared with what is free there, before anything is fetched.

In control groups, on a small disk and on ports of the host that tests make. That the OS kernel has no IPv6 at
all, which only a boot changes, is in tests/unit/restore/decide/test_match_needs.py.
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import Rekindle, free_port, need, small_disk, workhorse, workhorse_flags
from tests.integration.scenes import Saved, Scene, save, scene

pytestmark = pytest.mark.criu
CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def group(controller: str, **limits: int) -> Iterator[list[str]]:
    """A control group of version 1 or 2 with limits; yields the prefix of a command that runs in it."""
    top = CGROUPS / controller if (CGROUPS / controller / "cgroup.procs").exists() else CGROUPS
    directory = top / f"rekindle-test-{os.getpid()}"
    try:
        directory.mkdir()
        for name, limit in limits.items():
            (directory / name.replace("__", ".")).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            directory.rmdir()
        need(False, f"a control group of {controller} ({error.strerror})", "run as root of this machine")
    try:
        yield ["sh", "-c", f'echo $$ >{directory}/cgroup.procs; exec "$@"', "sh"]
    finally:
        directory.rmdir()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        yield made


def lacks(scene: Scene, image: str = "", prefix: Sequence[str] = ()) -> list[tuple[str, bool]]:
    """What `match` says against the process, of what a node has to give."""
    scene.rekindle.prefix = list(prefix)
    done = scene.rekindle("match", image or scene.saved.image, "--json", *scene.saved.key.verify)
    assert done.status in {0, 3}, done.stderr
    codes = {"memory", "tasks", "disk", "huge-pages", "port"}
    return [
        (each["code"], each["hard"]) for each in done.json["steps"][0]["reasons"] if each["code"] in codes
    ]


def test_a_node_with_enough_lacks_nothing(scene: Scene) -> None:
    assert lacks(scene) == []


def test_memory_that_a_control_group_does_not_allow(scene: Scene) -> None:
    """rekindle itself fits into it, and 64 GB for the server do not."""
    limit = "memory.limit_in_bytes" if (CGROUPS / "memory" / "cgroup.procs").exists() else "memory.max"
    image = scene.doctored(dump__own_bytes=64 << 30)
    with group("memory", **{limit: 1 << 30}) as inside:
        assert lacks(scene, prefix=inside) == []
        assert lacks(scene, image, inside) == [("memory", True)]


def test_tasks_that_a_control_group_does_not_allow(scene: Scene) -> None:
    image = scene.doctored(process__tasks=200)
    with group("pids", pids__max=100) as inside:
        assert lacks(scene, prefix=inside) == []
        assert lacks(scene, image, inside) == [("tasks", True)]


def test_room_that_the_disk_does_not_have(scene: Scene, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m"):
        # That CRIU works here was tried already, which takes more room.
        shutil.copytree(scene.rekindle.home / "tools", tmp_path / "disk/tools")
        scene.rekindle.home = tmp_path / "disk"
        assert lacks(scene) == [("disk", True)]


def test_huge_pages_that_are_not_reserved(scene: Scene) -> None:
    """A terabyte of them."""
    image = scene.doctored(process__huge_pages=[{"page_bytes": 2 << 20, "pages": 1 << 19}])
    assert lacks(scene, image) == [("huge-pages", True)]


def test_a_port_of_the_host_that_another_process_has(rekindle: Rekindle) -> None:
    port = free_port()
    flags = ["--network", "host", "--no-prove", *workhorse_flags(port)]
    done = rekindle("snapshot", "horse", *flags, "--", *workhorse(port))
    assert done.status == 0, done.stderr

    def hard() -> list[str]:
        steps = rekindle("match", "horse", "--json").json["steps"]
        return [each["code"] for each in steps[0]["reasons"] if each["hard"]]

    assert hard() == []
    with socket.create_server(("127.0.0.1", port)):
        assert hard() == ["port"]
