# SPDX-License-Identifier: Apache-2.0
"""A restored server that a driver does not let go when it is killed (NVIDIA/cuda-checkpoint#53).

The process is real, and stays in state D in its exit, until the fixture ends. The driver is that of
tests/fakes/cuda_engine.py.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import structs

from rekindle.cell import descendants
from tests.conftest import Rekindle, Replica, free_port, listening, need, wait_for
from tests.fakes import nodes
from tests.fakes.gpu_node import FakeGpuNode
from tests.servers import silent_fuse
from tests.traces import Traces, adopting_orphans
from tests.traces import descendants as descendants_of_ours

pytestmark = pytest.mark.criu
Restore = Callable[..., Replica]
ONE = structs.replace(nodes.H200, gpus=nodes.H200.gpus[:1], links=())
SUSPENDING = structs.replace(ONE, driver="595.71.05")
STUCK = r"\S.* \(PID \d+, \d+ in the cell\) waits in \w+"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> FakeGpuNode:
    return FakeGpuNode.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def saved(built: FakeGpuNode, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Homes with a snapshot of a server with CUDA in two processes, by the driver."""
    homes = {}
    for gpu in (ONE, SUSPENDING):
        built.begin(gpu)
        homes[gpu.driver] = tmp_path_factory.mktemp("saved") / "home"
        of = Rekindle(homes[gpu.driver], built.environment)
        done = of.snapshot_workhorse("horse", free_port(), "cuda=64", "cuda-child")
        assert done.status == 0, done.stderr
    return homes


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A file that lets nobody go who is killed while he has it open, until the end of the test."""
    need(Path("/dev/fuse").exists(), "/dev/fuse", "load the OS kernel's module fuse")
    with adopting_orphans():
        before = Traces.now()
        with silent_fuse.mounted(tmp_path / "driver", holds_the_killed=True):
            yield tmp_path / "driver/device"
        before.wait_until_nothing_is_left()


@pytest.fixture
def node(
    request: pytest.FixtureRequest,
    built: FakeGpuNode,
    saved: dict[str, Path],
    device: Path,
    rekindle: Rekindle,
) -> FakeGpuNode:
    gpu = getattr(request, "param", ONE)
    shutil.copytree(saved[gpu.driver], rekindle.home, symlinks=True, dirs_exist_ok=True)
    rekindle.env |= {**built.environment, "REKINDLE_CUDA_BACKEND": "driver"}
    built.begin(gpu, held_by_restored=str(device))
    return built


@pytest.fixture
def restore(node: FakeGpuNode, restore: Restore) -> Restore:
    return restore


with_595 = pytest.mark.parametrize("node", [SUSPENDING], indirect=True, ids=["595"])
with_both = pytest.mark.parametrize("node", [ONE, SUSPENDING], indirect=True, ids=["580", "595"])


def stuck() -> list[str]:
    """Whom below us no signal reaches."""
    return descendants.stuck(os.getpid())


@with_595
@pytest.mark.usefixtures("node")
def test_a_server_whose_driver_does_not_let_go_is_named_and_all_else_is_undone(
    restore: Restore, port: int
) -> None:
    """When somebody else has killed it, as the OS kernel does that runs out of memory."""
    mounts = Path("/proc/self/mountinfo").read_text()
    replica = restore("horse", port)
    for pid, line in descendants_of_ours(replica.process.pid).items():
        if "workhorse.py" in line and "rekindle" not in line:
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(stuck()) == 2, 10)
    replica.process.terminate()
    assert replica.process.wait(60) == 34, replica.log.read_text()
    said = replica.log.read_text()
    assert "error: the cell does not end: a process is stuck in the OS kernel\n" in said
    assert re.search(rf"cause: {STUCK}", said), said
    assert len(stuck()) == 2
    assert not listening(port)
    assert Path("/proc/self/mountinfo").read_text() == mounts


@with_595
@pytest.mark.usefixtures("node")
def test_a_server_that_is_suspended_first_is_let_go(restore: Restore, port: int) -> None:
    replica = restore("horse", port)
    replica.process.terminate()
    assert replica.process.wait(30) == 128 + signal.SIGTERM, replica.log.read_text()
    assert stuck() == []


@with_both
@pytest.mark.usefixtures("node")
def test_after_kill_9_of_rekindle_other_commands_go_on(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    replica = restore("horse", port)
    replica.kill()
    wait_for(lambda: len(stuck()) == 2, 10)
    held = stuck()
    again = restore("horse", port)
    assert again.report["outcome"] == "restored"
    assert len(json.loads(rekindle("ps", "--json").stdout)["replicas"]) == 1
    told = rekindle("doctor", "--check", "cuda").stdout
    pids = [re.search(r"PID (\d+)", each)[1] for each in held]  # type: ignore[index]
    assert all(f"process {pid} (" in told for pid in pids), told
    assert stuck()[:2] == held
    again.kill()
    done = rekindle("rm", "horse")
    assert done.status == 0, done.stderr


@with_both
def test_what_has_failed_is_told_and_who_does_not_end_as_well(
    request: pytest.FixtureRequest, restore: Restore, node: FakeGpuNode, device: Path, port: int
) -> None:
    """With 595, nobody is left: it was suspended before it was killed."""
    gpu = request.node.callspec.params["node"]
    node.begin(gpu, held_by_restored=str(device), faults=[{"step": "unlock", "code": 999}])
    replica = restore("horse", port)
    assert replica.report["outcome"] == "cold"
    reason = next(each for each in replica.report["reasons"] if each["rung"] == "process")
    assert reason["code"] == "cuda"
    assert "CUDA could not unlock process" in reason["here"]
    assert bool(re.search(STUCK, reason["here"])) == (gpu is ONE)
    assert len(stuck()) == (2 if gpu is ONE else 0)


@with_both
@pytest.mark.usefixtures("node")
def test_a_proof_whose_server_is_not_let_go_is_one(
    request: pytest.FixtureRequest, rekindle: Rekindle, port: int
) -> None:
    gpu = request.node.callspec.params["node"]
    done = rekindle.snapshot_workhorse("new", port, "cuda=64", "cuda-child")
    assert done.status == 0, done.stderr
    told = "WARNING: the cell does not end: a process is stuck in the OS kernel"
    assert bool(re.search(f"{told}: {STUCK}", done.stderr)) == (gpu is ONE)
    assert len(stuck()) == (2 if gpu is ONE else 0)
    assert rekindle("inspect", "new").status == 0
