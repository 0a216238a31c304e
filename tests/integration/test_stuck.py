# SPDX-License-Identifier: Apache-2.0
"""A process that the OS kernel does not let go, since its file system does not answer: we do not wait for it
for ever, and say who it is."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rekindle import cell as cells
from rekindle.cell import Cell, Command, Network
from rekindle.errors import RestoreError
from tests.conftest import listening, need, wait_for
from tests.integration.scenes import MULE, Saved, Scene, save, scene
from tests.servers import silent_fuse
from tests.traces import adopting_orphans, children

pytestmark = pytest.mark.criu
SERVER = [*MULE, "drains=0"]


@pytest.fixture
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    need(Path("/dev/fuse").exists(), "/dev/fuse", "load the OS kernel's module fuse")
    place = tmp_path_factory.mktemp("file-system") / "silent"
    with silent_fuse.mounted(place):
        yield place


def run_stuck(cell: Cell, place: Path) -> None:
    """Starts a process that asks the silent file system."""
    command = f"stat {place}/file & wait"
    cell.spawn(Command(argv=["sh", "-c", command], env={"PATH": os.defpath}, cwd=Path("/")))
    wait_for(lambda: any("stat" in name for name in names(cell)), 10)
    time.sleep(0.2)


def names(cell: Cell) -> list[str]:
    found = []
    for pid in (cell.root / "proc").iterdir():
        if pid.name.isdecimal():
            found.append((pid / "comm").read_text().strip())
    return found


def test_the_end_of_a_cell_names_who_is_stuck(silent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_STUCK_SECONDS", 1.0)
    with adopting_orphans():
        cell = Cell().enter(Network.PRIVATE)
        run_stuck(cell, silent)
        began = time.monotonic()
        with pytest.raises(RestoreError, match="stuck in the OS kernel") as caught:
            cell.end()
        assert time.monotonic() - began < 10
        assert re.fullmatch(r"stat \(PID \d+, \d+ in the cell\) waits in \w+", caught.value.cause)
        cell.end()  # there is no second wait
        assert time.monotonic() - began < 10


def test_who_dies_slowly_is_waited_for(silent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that frees much memory."""
    monkeypatch.setattr(cells, "_STUCK_SECONDS", 2.0)
    with adopting_orphans():
        cell = Cell().enter(Network.PRIVATE)
        run_stuck(cell, silent)
        ticks = iter(range(1000))
        monkeypatch.setattr("rekindle.cell.descendants.cpu_ticks", lambda _: {1: next(ticks)})
        began = time.monotonic()
        release = threading.Timer(4, silent_fuse.let_go, [silent])
        release.start()
        cell.end()
        assert time.monotonic() - began >= 4
        release.join()


def fail_in_a_cell(silent: Path) -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        run_stuck(cell, silent)
        raise ValueError("the test itself")


def test_what_is_raised_within_a_cell_is_not_forgotten(silent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_STUCK_SECONDS", 1.0)
    with adopting_orphans():
        with pytest.raises(RestoreError, match="stuck") as caught:
            fail_in_a_cell(silent)
        assert str(caught.value.__context__) == "the test itself"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"), server=SERVER)


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path, silent: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        made.puts(*SERVER)
        yield made


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_restore_ends_though_a_process_is_stuck(scene: Scene, silent: Path, signum: int) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    running = scene.restore()
    running.until_ready("restored")
    running.ask("/stat", f"{silent}/file")
    time.sleep(0.2)
    running.send(signum)
    assert running.process.wait(30) == 34, running.said
    assert "error: the cell does not end: a process is stuck in the OS kernel\n" in running.said
    assert re.search(r"cause: python\S* \(PID \d+, \d+ in the cell\) waits in \w+\n", running.said)
    assert not listening(running.port)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert len(children()) >= 1  # it is still there, and holds the cell's namespaces
    silent_fuse.let_go(silent)
    scene.nothing_is_left()
