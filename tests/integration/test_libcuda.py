# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's libcuda 555 and its cuda-checkpoint, asked without a GPU what the stand-in only imitates.

hack/get-libcuda-555 installs them; where they cannot be had, these tests are skipped.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PREFIX, Rekindle, Replica
from tests.fakes import cuda_engine, nodes
from tests.fakes.gpu_node import with_device
from tests.fakes.nvml import FakeNvml

pytestmark = pytest.mark.criu
PLACE = PREFIX / "libcuda-555"
NO_START = 'Error initializing CUDA: "no CUDA-capable device is detected"'


@pytest.fixture(autouse=True)
def libcuda(rekindle: Rekindle, tmp_path: Path) -> Path:
    """The library, for this test's commands, which have a /dev of their own: it makes devices."""
    if not (PLACE / ".complete").exists():
        pytest.skip("this test needs libcuda 555: run hack/get-libcuda-555")
    rekindle.prefix = with_device("/dev/unused", tmp_path / "dev")
    rekindle.env |= {
        "LD_LIBRARY_PATH": f"{PLACE}/lib",
        "REKINDLE_CUDA_CHECKPOINT": f"{PLACE}/bin/cuda-checkpoint",
    }
    return PLACE / "lib/libcuda.so.1"


def test_the_stand_in_prints_what_the_real_tool_prints(libcuda: Path) -> None:
    content = libcuda.read_bytes()
    for text in cuda_engine.TEXTS:
        assert f"{text}\n".encode() in content, text
    assert b"cuda%011llx\0" in content, "the name of the restore thread"
    for _, text in cuda_engine.CODES.values():
        assert text.encode() in content, text


def test_doctor_tells_that_the_driver_does_not_start(rekindle: Rekindle, tmp_path: Path) -> None:
    """NVML alone is a stand-in: a node with a GPU whose driver does not work."""
    (tmp_path / "nvml").mkdir()
    nvml = FakeNvml(tmp_path / "nvml")
    nvml.describe(nodes.H100)
    paths = f"{rekindle.env['LD_LIBRARY_PATH']}:{nvml.environment['LD_LIBRARY_PATH']}"
    rekindle.env |= {**nvml.environment, "LD_LIBRARY_PATH": paths}
    done = rekindle("doctor", "--check", "cuda", "--json")
    assert done.status == 10, done.stderr
    checks = [check for check in done.json["checks"] if check["name"] == "cuda"]
    driver, utility = [check["detail"] for check in checks if not check["ok"]]
    assert driver.startswith("driver: libcuda.so.1 has no cuCheckpoint")
    assert utility == f"utility: {NO_START}"


def test_a_real_restore_thread_outlives_a_dump(
    rekindle: Rekindle, restore: Callable[..., Replica], port: int
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, "libcuda")
    assert done.status == 0, done.stderr
    replica = restore("horse", port)
    facts = json.loads(replica.ask("/facts"))
    (name,) = [each for each in facts["threads"] if each.startswith("cuda")]
    opened = {int(fd): target for fd, target in facts["descriptors"].items()}
    for end in cuda_engine.ends(name):
        assert opened[end].startswith("pipe:")
