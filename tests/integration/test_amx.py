# SPDX-License-Identifier: Apache-2.0
"""AMX: the permission is there after a restore. The helper is compiled and loaded on every x86-64."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable
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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_the_helper_compiles_and_asks_for_the_permission(tmp_path: Path) -> None:
    helper = amx.compiled(tmp_path)
    assert amx.compiled(tmp_path) == helper, "compiled twice"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ASK],
        env={"LD_PRELOAD": str(helper)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "", "the loader complains"
    assert bool(int(done.stdout) & (1 << 18)) == amx.present()


@pytest.mark.criu
@pytest.mark.skipif(not amx.present(), reason="this processor has no AMX")
def test_a_restored_server_may_use_amx(
    rekindle: Rekindle, restore: Callable[..., Replica], port: int
) -> None:
    assert rekindle.snapshot_workhorse("horse", port).status == 0
    facts = json.loads(restore("horse", port).ask("/facts"))
    assert facts["xcomp_permission"] & (1 << 18)
