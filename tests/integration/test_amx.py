# SPDX-License-Identifier: Apache-2.0
"""AMX: the permission is there after a restore, by an object that every x86-64 loads and no compiler made."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rekindle.criu import amx
from tests.conftest import Rekindle, Replica

ASK = """
import ctypes
libc = ctypes.CDLL(None)
mask = ctypes.c_ulong()
libc.syscall(158, 0x1022, ctypes.byref(mask))  # ARCH_GET_XCOMP_PERM
print(mask.value)
"""


@pytest.fixture
def fd() -> Iterator[int]:
    fd = amx.open_object()
    yield fd
    os.close(fd)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_the_object_is_loaded_and_asks_for_the_permission(fd: int) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ASK],
        env={"LD_PRELOAD": f"/proc/self/fd/{fd}"},
        pass_fds=[fd],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "", "the loader complains"
    assert bool(int(done.stdout) & (1 << 18)) == amx.present()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_the_object_asks_for_no_executable_stack(fd: int) -> None:
    show = "print(*(line.split()[1] for line in open('/proc/self/maps') if '[stack]' in line))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", show],
        env={"LD_PRELOAD": f"/proc/self/fd/{fd}"},
        pass_fds=[fd],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "rw-p\n"


@pytest.mark.criu
@pytest.mark.skipif(not amx.present(), reason="this processor has no AMX")
@pytest.mark.parametrize("name", ["a home with blanks", "home:with:colons"])
def test_a_restored_server_may_use_amx_without_a_compiler(
    rekindle: Rekindle, restore: Callable[..., Replica], horse_port: int, tmp_path: Path, name: str
) -> None:
    rekindle.home = rekindle.home.rename(tmp_path / name)
    rekindle.env["PATH"] = str(Path(sys.executable).parent)
    facts = json.loads(restore("horse", horse_port, "--require", "process").ask("/facts"))
    assert facts["xcomp_permission"] & (1 << 18)
