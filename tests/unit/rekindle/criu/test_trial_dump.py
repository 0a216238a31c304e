# SPDX-License-Identifier: Apache-2.0
"""The dump for trials has a program that runs, and the capabilities that it is given."""

import platform
import subprocess
import time
from pathlib import Path

import pytest

from rekindle.criu import trial_dump
from rekindle.criu.image_files import read_messages
from rekindle.criu.inherited import CORE_MAGIC
from rekindle.criu.protobuf import content, read_fields

ALL = {"CapPrm": 0x1FF_FFFF_FFFF, "CapEff": 0x3F, "CapBnd": 1 << 40}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is x86-64's")
def test_the_program_unmaps_its_vdso_and_pauses(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(trial_dump.program())
    path.chmod(0o755)
    with subprocess.Popen([path], env={}) as process:
        try:
            deadline = time.monotonic() + 10
            maps = Path(f"/proc/{process.pid}/maps")
            while "program" not in maps.read_text() or "[vdso]" in maps.read_text():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()


def test_the_process_has_the_capabilities_that_are_asked_for(tmp_path: Path) -> None:
    trial_dump.write(tmp_path, ALL)
    core = tmp_path / f"core-{trial_dump.PID}.img"
    (message,) = read_messages(core, CORE_MAGIC)
    thread = read_fields(content(read_fields(message, core), 5) or b"", core)
    found = read_fields(content(thread, 10) or b"", core)
    halves = {number: [value for each, _, value in found if each == number] for number in (10, 11, 12)}
    assert halves == {10: [0xFFFFFFFF, 0x1FF], 11: [0x3F, 0], 12: [0, 1 << 8]}


def test_packing_what_was_written_changes_nothing(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    trial_dump.write(tmp_path / "one", ALL)
    text = trial_dump.pack(tmp_path / "one")
    assert all(character.isprintable() and character not in '"\\' for character in text)
    assert text == trial_dump.pack(tmp_path / "one")
