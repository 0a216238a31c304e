# SPDX-License-Identifier: Apache-2.0
"""Memory files through FUSE: what is touched is known, page by page, and nothing is left behind."""

import ctypes
import hashlib
import json
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from oci import media_types
from oci.blocks import read_blocks
from oci.descriptor import Descriptor
from rekindle import fuse
from rekindle.cell.touch_recorder import Touch, TouchRecorder
from rekindle.record import StoredBlocks
from tests.conftest import Rekindle

pytestmark = pytest.mark.criu

PAGE = 4096
_CLONE_NEWNS, _MS_REC_PRIVATE, _MOVE_MOUNT, _AT_FDCWD, _EMPTY_PATH = 0x20000, 0x44000, 429, -100, 4


def within(mount: int, place: Path, act: Callable[[], object]) -> int:
    """Attach a mount in a child with a mount namespace of its own, and act there; return its wait status."""
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None)
        libc.unshare(_CLONE_NEWNS)
        libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None)
        attached = libc.syscall(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(place), _EMPTY_PATH)
        try:
            os._exit(0 if attached == 0 and act() is None else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(pid, 0)[1]


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def test_touches_are_recorded_in_order_and_page_by_page(tmp_path: Path) -> None:
    content = os.urandom(64 * PAGE)
    (tmp_path / "7").write_bytes(content)
    place = tmp_path / "place"
    place.mkdir()
    before = mounts()

    def act() -> None:
        with open(place / "7", "rb") as file:
            memory = mmap.mmap(
                file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE
            )
            for page in (40, 3, 41, 40):
                at = page * PAGE + 5
                assert memory[at] == content[at]
            memory[10 * PAGE] = 1

    with TouchRecorder([tmp_path / "7"]) as recorder:
        assert within(recorder.mount, place, act) == 0
    assert recorder.touches == [Touch("7", page * PAGE, PAGE) for page in (40, 3, 41, 10)]
    assert mounts() == before


def test_the_end_of_the_file_system_ends_those_who_wait(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    taken: list[fuse.Read] = []

    def act() -> None:
        with open(tmp_path / "place/7", "rb") as file:
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[0]

    def take(read: fuse.Read) -> None:
        taken.append(read)
        directory.close()

    directory = fuse.Directory([fuse.File("7", PAGE)], take)
    pid = os.fork()
    if pid == 0:
        os.closerange(directory.mount + 1, 1000)
        os.closerange(3, directory.mount)  # whoever has /dev/fuse open keeps the file system alive
        os._exit(os.waitstatus_to_exitcode(within(directory.mount, tmp_path / "place", act)) & 0xFF)
    directory.serve()  # returns, since it was closed
    assert [each.offset for each in taken] == [0]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS & 0xFF


def test_the_image_begins_with_what_the_proof_touched(port: int, rekindle: Rekindle) -> None:
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 0, done.stderr
    inspected = rekindle("inspect", "horse", "--json").json
    dump = inspected["record"]["dump"]
    (stored,) = dump["blocks"]
    layer = next(each for each in layers_of(rekindle) if each.digest == stored["layer"])
    blocks = read_blocks(StoredBlocks(**stored), layer)
    touched = {
        (number, page)
        for number, file in enumerate(dump["files"])
        for each in dump["memory"]
        if each["path"] == file["path"]
        for offset, length in each["working_set"]
        for page in range(offset // PAGE, (offset + length) // PAGE)
    }
    covered = [
        {(file, page) for file, start, end in block.spans for page in range(start // PAGE, end // PAGE)}
        for block in blocks
    ]
    first = [pages <= touched for pages in covered].index(False)
    assert first, "the first blocks hold what was touched"
    bytes_first = sum(block.length for block in blocks[:first])
    assert bytes_first < layer.size / 2, "and nothing else: the server has 4 MiB of noise that nobody reads"
    data = sum(each["data_bytes"] for each in dump["memory"])
    assert 0 < sum(map(len, covered[:first])) * PAGE < data / 2
    for block in blocks:
        content = blob(rekindle, layer)[block.offset : block.offset + block.length]
        assert hashlib.sha256(content).digest() == block.digest


def layers_of(rekindle: Rekindle) -> list[Descriptor]:
    """The layers of the only process image in the store."""
    for path in (rekindle.home / "store/blobs/sha256").iterdir():
        if path.stat().st_size < 1 << 20 and (content := path.read_bytes()).startswith(b"{"):
            manifest = json.loads(content)
            if manifest.get("artifactType") == media_types.PROCESS:
                return [Descriptor.from_json(each, "layer") for each in manifest["layers"]]
    raise AssertionError


def blob(rekindle: Rekindle, layer: Descriptor) -> bytes:
    return (rekindle.home / "store/blobs/sha256" / layer.digest.hex).read_bytes()
