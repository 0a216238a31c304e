# SPDX-License-Identifier: Apache-2.0
"""Snapshot and restore servers that hold CUDA, with real CRIU, real processes and a fake driver.

tests/fakes/cuda_engine.py describes that driver. What is done to processes is tested with both backends.
"""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rekindle.node.gpu import Gpus
from tests.conftest import PREFIX, Rekindle, Replica, free_port, workhorse, workhorse_flags
from tests.fakes import nodes
from tests.fakes.cuda import Event, ordered
from tests.fakes.gpu_node import FakeGpuNode, with_device

pytestmark = pytest.mark.criu
NothingLeft = Callable[[], None]
Restore = Callable[..., Replica]

ONE = structs.replace(nodes.H200, gpus=nodes.H200.gpus[:1], links=())
TWO = structs.replace(nodes.H200, gpus=nodes.H200.gpus[:2], links=nodes.linked(2, "nvlink"))
ANOTHER = structs.replace(ONE, gpus=nodes.H200.gpus[5:6])
UUID, OTHER_UUID = ONE.gpus[0].uuid, ANOTHER.gpus[0].uuid
CUDA = ("cuda=64", "cuda-child")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> FakeGpuNode:
    return FakeGpuNode.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def node(request: pytest.FixtureRequest, built: FakeGpuNode, rekindle: Rekindle) -> FakeGpuNode:
    """Where this test's commands run, until the test says otherwise: one GPU, and one backend."""
    built.begin(ONE)
    rekindle.env |= {**built.environment, "REKINDLE_CUDA_BACKEND": getattr(request, "param", "driver")}
    return built


@pytest.fixture(scope="module")
def saved(built: FakeGpuNode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a snapshot of a server with CUDA in two processes, on one GPU."""
    built.begin(ONE)
    home = tmp_path_factory.mktemp("saved") / "home"
    done = Rekindle(home, built.environment).snapshot_workhorse("horse", free_port(), *CUDA)
    assert done.status == 0, done.stderr
    return home


@pytest.fixture
def horse(saved: Path, node: FakeGpuNode, rekindle: Rekindle) -> None:
    """The same, for this test."""
    shutil.copytree(saved, rekindle.home, symlinks=True, dirs_exist_ok=True)
    node.cuda.forget()


both_backends = pytest.mark.parametrize("node", ["driver", "utility"], indirect=True)


def steps(log: list[Event]) -> list[Event]:
    """What was done to processes, in order, without questions."""
    return [
        each
        for each in log
        if each.event == "end" and each.step in {"lock", "checkpoint", "restore", "unlock"}
    ]


def ends_in(log: list[Event]) -> dict[int, str | None]:
    """What each process that anything was done to was in at last."""
    touched = {each.pid for each in steps(log)}
    return {each.pid: each.after for each in log if each.event == "end" and each.pid in touched}


def process_of(rekindle: Rekindle) -> dict[str, Any]:
    found = rekindle("inspect", "horse", "--json").json["record"]["process"]
    assert isinstance(found, dict)
    return found


def reasons(replica: Replica) -> dict[str, bool]:
    """The codes of the reasons in a report, and whether they are hard."""
    return {reason["code"]: reason["hard"] for reason in replica.report["reasons"]}


def refused(rekindle: Rekindle, node: FakeGpuNode, port: int, status: int, *behaviours: str) -> str:
    """What a snapshot says that fails, before anything was done to a process, and is not published."""
    done = rekindle.snapshot_workhorse("horse", port, *behaviours)
    assert done.status == status, done.stderr
    assert steps(node.cuda.log()) == []
    assert rekindle("inspect", "horse").status == 12
    return done.stderr


@both_backends
def test_a_server_with_cuda_in_two_processes_goes_on_where_it_was(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, nothing_left: NothingLeft
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, flags=["--no-prove", "--json"])
    assert done.status == 0, done.stderr
    assert "cuda" in [phase["name"] for phase in done.json["phases"]]
    before = node.cuda.log()
    assert [each.step for each in steps(before)] == ["lock"] * 2 + ["checkpoint"] * 2
    assert ordered(before, before="lock", after="checkpoint")
    assert set(ends_in(before).values()) == {"checkpointed"}, "it was dumped otherwise"
    process = process_of(rekindle)
    assert len(process["cuda_pids"]) == 2
    assert process["server_pid"] in process["cuda_pids"]
    assert process["gpus"] == [UUID]

    node.cuda.forget()
    replica = restore("horse", port)
    assert replica.report["outcome"] == "restored"
    assert replica.report["oracle"]["match"] is True
    after = node.cuda.log()
    assert [each.step for each in steps(after)] == ["restore"] * 2 + ["unlock"] * 2
    assert ordered(after, before="restore", after="unlock")
    assert {each.before for each in steps(after) if each.step == "restore"} == {"checkpointed"}
    assert set(ends_in(after).values()) == {"running"}
    assert not {each.pid for each in steps(before)} & {each.pid for each in steps(after)}
    if all(each.backend == "driver" for each in after):
        assert sum(each.step == "init" for each in after) == 1, "it took its seconds more than once"
    names = [phase["name"] for phase in replica.report["phases"]]
    assert names.index("restore") < names.index("cuda") < names.index("oracle")
    facts = json.loads(replica.ask("/facts"))
    assert [(held["state"], held["uuids"]) for held in facts["cuda"]] == [("running", [UUID])] * 2
    replica.kill()
    nothing_left()


def test_the_snapshot_is_proved_with_its_cuda_state(
    rekindle: Rekindle, node: FakeGpuNode, port: int, nothing_left: NothingLeft
) -> None:
    context = 3 << 29
    node.nvml.describe(ONE, context=context)  # which NVML counts, and no checkpoint moves
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, flags=["--json"])
    assert done.status == 0, done.stderr
    assert done.json["oracle"]["match"] is True
    assert done.json["bytes"]["device"] == 2 * (context + (64 << 20)) > done.json["bytes"]["dump"]
    done_to = [each.step for each in steps(node.cuda.log())]
    assert done_to == ["lock"] * 2 + ["checkpoint"] * 2 + ["restore"] * 2 + ["unlock"] * 2
    nothing_left()


def test_a_restored_server_is_suspended_before_it_ends_where_that_could_hang_the_host(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, nothing_left: NothingLeft
) -> None:
    """By the proof of a snapshot, and by a signal."""
    node.begin(structs.replace(ONE, driver="595.71.05"))
    done = rekindle.snapshot_workhorse("horse", port, "cuda=64")
    assert done.status == 0, done.stderr
    there, back = ["lock", "checkpoint"], ["restore", "unlock"]
    assert [each.step for each in steps(node.cuda.log())] == [*there, *back, *there]
    node.cuda.forget()
    replica = restore("horse", port)
    replica.process.terminate()
    assert replica.process.wait(30) == 128 + signal.SIGTERM
    assert [each.step for each in steps(node.cuda.log())] == [*back, *there]
    nothing_left()


@pytest.mark.usefixtures("horse")
def test_a_replica_goes_where_there_is_memory_or_where_it_is_told(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    first, second = (gpu.uuid for gpu in TWO.gpus)
    node.describe(TWO)
    node.nvml.describe(TWO, used={0: TWO.gpus[0].memory_bytes // 2})
    assert rekindle("restore", "horse", "--plan", "--json").json["device_map"] == {first: second}
    named = rekindle("restore", "horse", "--plan", "--json", "--gpu", first)
    assert named.json["device_map"] == {}
    refused = rekindle("restore", "horse", "--gpu", OTHER_UUID)
    assert refused.status == 2
    assert f"--gpu: this node has no GPU {OTHER_UUID}" in refused.stderr
    replica = restore("horse", port)
    facts = json.loads(replica.ask("/facts"))
    assert [held["uuids"] for held in facts["cuda"]] == [[second]] * 2


@pytest.mark.usefixtures("horse")
def test_too_little_free_memory_on_the_gpu_is_told_before_the_driver_is_called(
    rekindle: Rekindle, node: FakeGpuNode
) -> None:
    """Since a restore that has run out of memory cannot be repeated."""
    node.nvml.describe(ONE, used={0: ONE.gpus[0].memory_bytes - (64 << 20)})
    done = rekindle("restore", "horse", "--require", "process")
    assert done.status == 34, done.stderr
    assert "not enough free memory on the GPU" in done.stderr
    # 64 MiB, less one if our own client of the driver holds the device by then
    assert re.search(
        "the server held [0-9,]+ bytes on GPUs, and (66,060,288|67,108,864) are free", done.stderr
    ), done.stderr
    assert steps(node.cuda.log()) == []


@pytest.mark.usefixtures("horse")
def test_two_replicas_hold_their_own_state(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    node.cuda.forget()
    for replica in [restore("horse", port), restore("horse", port + 1)]:
        assert json.loads(replica.ask("/facts"))["cuda"][0]["state"] == "running"
    assert len(ends_in(node.cuda.log())) == 4


@both_backends
@pytest.mark.usefixtures("horse")
def test_on_a_node_with_other_gpus_they_take_the_places_of_the_recorded_ones(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    node.describe(ANOTHER)
    assert rekindle("restore", "horse", "--plan", "--json").json["device_map"] == {UUID: OTHER_UUID}
    replica = restore("horse", port)
    assert replica.report["outcome"] == "restored"
    assert reasons(replica) == {"gpu-uuid": False}
    facts = json.loads(replica.ask("/facts"))
    assert [held["uuids"] for held in facts["cuda"]] == [[OTHER_UUID]] * 2


def test_a_server_on_two_gpus_keeps_those_that_are_there(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    node.begin(TWO)
    first, second = (gpu.uuid for gpu in TWO.gpus)
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, f"cuda-uuids={first},{second}")
    assert done.status == 0, done.stderr
    assert process_of(rekindle)["gpus"] == [first, second]
    node.describe(structs.replace(TWO, gpus=(nodes.H200.gpus[7], TWO.gpus[0])))
    replica = restore("horse", port)
    assert replica.report["outcome"] == "restored", replica.log.read_text()
    moved = json.loads(replica.ask("/facts"))["cuda"][0]["uuids"]
    assert moved == [first, nodes.H200.gpus[7].uuid]


def test_what_the_server_does_not_hold_is_nothing_to_it(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    node.begin(TWO)
    assert rekindle.snapshot_workhorse("horse", port, *CUDA).status == 0
    assert process_of(rekindle)["gpus"] == [UUID]
    node.describe(ONE)
    assert restore("horse", port).report["outcome"] == "restored"


@pytest.mark.parametrize(
    ("there", "code"),
    [
        (structs.replace(nodes.H100, driver=ONE.driver), "gpu-model"),
        (structs.replace(ONE, driver="570.158.01", cuda="12.8"), "driver"),
        (structs.replace(ONE, gpus=(structs.replace(ONE.gpus[0], mig=True),)), "mig"),
    ],
)
@pytest.mark.usefixtures("horse")
def test_a_node_whose_gpus_do_not_fit_takes_a_lower_rung(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, there: Gpus, code: str
) -> None:
    node.begin(there)
    done = rekindle("restore", "horse", "--require", "process")
    assert done.status == 11, done.stderr
    assert f"{code}: " in done.stderr
    replica = restore("horse", port)
    assert replica.report["outcome"] == "cold"
    assert reasons(replica)[code] is True
    assert replica.ask("/count", {}) == "1"
    assert steps(node.cuda.log()) == []


@both_backends
@pytest.mark.usefixtures("horse")
def test_a_node_without_a_driver_takes_a_lower_rung(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    node.begin(Gpus(), library=False, utility=False)
    done = rekindle("restore", "horse", "--require", "process")
    assert done.status == 10, done.stderr
    assert "cuda: " in done.stderr
    replica = restore("horse", port)
    assert replica.report["outcome"] == "cold"
    assert reasons(replica)["cuda"] is True


@both_backends
@pytest.mark.usefixtures("horse")
def test_a_node_with_the_gpu_and_without_a_backend_takes_a_lower_rung(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    node.begin(ONE, library=False, utility=False)
    assert rekindle("restore", "horse", "--require", "process").status == 10
    found = reasons(restore("horse", port))
    assert {code for code, hard in found.items() if hard and code.startswith(("cuda", "gpu"))} == {"cuda"}


@both_backends
@pytest.mark.parametrize(("step", "nth"), [("restore", 2), ("unlock", 1)])
@pytest.mark.usefixtures("horse")
def test_cuda_state_that_does_not_come_back_costs_the_rung(
    rekindle: Rekindle,
    restore: Restore,
    node: FakeGpuNode,
    port: int,
    step: str,
    nth: int,
    nothing_left: NothingLeft,
) -> None:
    faults = [{"step": step, "nth": nth, "code": 2, "times": 1}]
    node.begin(ONE, faults=faults)
    done = rekindle("restore", "horse", "--require", "process")
    assert done.status == 37, done.stderr
    assert "CUDA could not" in done.stderr
    assert "out of memory" in done.stderr
    assert not {each.step for each in node.cuda.log()} & {"lock", "checkpoint"}, (
        "it ends with its cell anyway"
    )
    node.begin(ONE, faults=faults)
    replica = restore("horse", port)
    assert replica.report["outcome"] == "cold"
    assert reasons(replica)["cuda"] is True
    replica.kill()
    nothing_left()


def test_a_snapshot_whose_state_does_not_come_back_is_not_published(
    rekindle: Rekindle, node: FakeGpuNode, port: int, nothing_left: NothingLeft
) -> None:
    node.begin(ONE, faults=[{"step": "restore", "code": 2}])
    done = rekindle.snapshot_workhorse("horse", port, *CUDA)
    assert done.status == 37, done.stderr
    assert rekindle("inspect", "horse").status == 12
    nothing_left()


@both_backends
@pytest.mark.parametrize(
    "fault",
    [
        {"step": "lock", "nth": 2, "code": 600, "seconds": 0.5},  # as after a time-out: device not ready
        {"step": "lock", "nth": 1, "code": 801},
        {"step": "checkpoint", "nth": 1, "code": 2},
        {"step": "checkpoint", "nth": 3, "code": 2},
        {"step": "checkpoint", "nth": 4, "code": 801},
    ],
    ids=lambda fault: f"{fault['step']}-{fault['nth']}-{fault['code']}",
)
def test_one_process_of_four_that_fails_leaves_every_one_running(
    rekindle: Rekindle, node: FakeGpuNode, port: int, fault: dict[str, Any], nothing_left: NothingLeft
) -> None:
    node.begin(ONE, faults=[fault])
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, "cuda-others=2")
    assert done.status == 37, done.stderr
    assert f"CUDA could not {fault['step']} process" in done.stderr
    log = node.cuda.log()
    assert len(ends_in(log)) == 4
    assert set(ends_in(log).values()) == {"running"}
    assert [each.code for each in steps(log) if each.code] == [fault["code"]]
    if fault["step"] == "checkpoint":
        assert ordered(log, before="restore", after="unlock")
    assert rekindle("inspect", "horse").status == 12
    nothing_left()


def test_processes_that_run_on_after_their_checkpoint_are_not_dumped(
    rekindle: Rekindle, node: FakeGpuNode, port: int
) -> None:
    node.begin(ONE, faults=[{"step": "checkpoint", "nth": 2, "code": 0}])  # and nothing was done
    done = rekindle.snapshot_workhorse("horse", port, *CUDA)
    assert done.status == 37, done.stderr
    assert set(ends_in(node.cuda.log()).values()) == {"running"}


@both_backends
def test_a_dump_that_fails_leaves_every_process_running(
    rekindle: Rekindle, node: FakeGpuNode, port: int, tmp_path: Path, nothing_left: NothingLeft
) -> None:
    criu, broken = tmp_path / "criu", tmp_path / "broken"
    criu.write_text(f'#!/bin/sh\n[ "$1" = dump ] && [ -e {broken} ] && exit 1\nexec {PREFIX}/bin/criu "$@"\n')
    criu.chmod(0o755)
    rekindle.env["REKINDLE_CRIU"] = str(criu)
    # By which it was tried, and is known to work.
    assert rekindle.snapshot_workhorse("works", port, flags=["--no-prove"]).status == 0
    broken.touch()
    done = rekindle.snapshot_workhorse("horse", port, *CUDA)
    assert done.status == 33, done.stderr
    done_to = [each.step for each in steps(node.cuda.log())]
    assert done_to == ["lock"] * 2 + ["checkpoint"] * 2 + ["restore"] * 2 + ["unlock"] * 2
    assert set(ends_in(node.cuda.log()).values()) == {"running"}
    nothing_left()


@both_backends
@pytest.mark.parametrize(("step", "signum"), [("lock", signal.SIGTERM), ("checkpoint", signal.SIGINT)])
def test_a_signal_amid_it_leaves_every_process_running(
    rekindle: Rekindle,
    node: FakeGpuNode,
    port: int,
    tmp_path: Path,
    step: str,
    signum: signal.Signals,
    nothing_left: NothingLeft,
) -> None:
    node.begin(ONE, seconds={step: 1.0})
    words = ["snapshot", "horse", *workhorse_flags(port), "--", *workhorse(port, *CUDA)]
    process = rekindle.spawn(*words, log=tmp_path / "log")
    node.cuda.wait_for(step, count=2)
    process.send_signal(signum)
    assert process.wait(60) == 128 + signum
    log = node.cuda.log()
    assert set(ends_in(log).values()) == {"running"}
    expected = ["lock"] * 2 + (["checkpoint"] * 2 + ["restore"] * 2 if step == "checkpoint" else [])
    assert [each.step for each in steps(log)] == [*expected, *["unlock"] * 2]
    assert rekindle("inspect", "horse").status == 12
    nothing_left()


def test_kill_9_between_lock_and_checkpoint_leaves_nothing(
    rekindle: Rekindle, node: FakeGpuNode, port: int, tmp_path: Path, nothing_left: NothingLeft
) -> None:
    node.begin(ONE, seconds={"checkpoint": 1.0})
    words = ["snapshot", "horse", *workhorse_flags(port), "--", *workhorse(port, *CUDA)]
    process = rekindle.spawn(*words, log=tmp_path / "log")
    node.cuda.wait_for("checkpoint", count=2)
    process.kill()
    process.wait()
    nothing_left()


@pytest.mark.parametrize(
    ("hold", "path", "words"),
    [
        ("device", "/dev/nvidia0", "VLLM_WORKER_MULTIPROC_METHOD=spawn"),
        ("device", "/dev/nvidiactl", "nvmlShutdown"),
    ],
)
def test_a_device_that_is_still_held_after_the_checkpoint_is_named(
    rekindle: Rekindle,
    node: FakeGpuNode,
    port: int,
    tmp_path: Path,
    hold: str,
    path: str,
    words: str,
    nothing_left: NothingLeft,
) -> None:
    rekindle.prefix = with_device(path, tmp_path / "dev")
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, f"hold={hold}", f"path={path}")
    assert done.status == 32, done.stderr
    assert f": {path}" in done.stderr
    assert words in done.stderr
    done_to = [each.step for each in steps(node.cuda.log())]
    assert done_to == ["lock"] * 2 + ["checkpoint"] * 2 + ["restore"] * 2 + ["unlock"] * 2
    assert set(ends_in(node.cuda.log()).values()) == {"running"}
    nothing_left()


def test_gpus_are_kept_initialized_by_a_snapshot_and_by_a_restore(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, tmp_path: Path
) -> None:
    """Without persistence mode, the last user of a GPU dies with it (NVIDIA/cuda-checkpoint#25)."""
    rekindle.prefix = with_device("/dev/nvidia0", tmp_path / "dev")
    node.begin(ONE, last_user_of="/dev/nvidia0")
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, flags=["--no-prove"])
    assert done.status == 0, done.stderr
    rekindle.prefix = with_device("/dev/nvidia0", tmp_path / "another-dev")
    replica = restore("horse", port)
    assert replica.report["outcome"] == "restored", replica.log.read_text()


def test_nvml_is_shut_down_before_the_dump(
    rekindle: Rekindle, node: FakeGpuNode, port: int, tmp_path: Path
) -> None:
    """As in vLLM's API server, which initializes it, never shuts it down, and uses no CUDA itself."""
    rekindle.prefix = with_device("/dev/nvidiactl", tmp_path / "dev")
    done = rekindle.snapshot_workhorse("horse", port, "nvml=2", flags=["--no-prove", "--reseed", "none"])
    assert done.status == 0, done.stderr
    assert process_of(rekindle)["hooked"] == [], "nothing is reseeded"


@pytest.mark.parametrize("behaviours", [CUDA, ()])
def test_a_device_of_a_process_without_cuda_is_named_before_anything_is_locked(
    rekindle: Rekindle, node: FakeGpuNode, port: int, tmp_path: Path, behaviours: tuple[str, ...]
) -> None:
    rekindle.prefix = with_device("/dev/nvidia0", tmp_path / "dev")
    held = ["hold=device-of-another", "path=/dev/nvidia0"]
    said = refused(rekindle, node, port, 32, *behaviours, *held)
    assert ": /dev/nvidia0" in said


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/dev/infiniband/uverbs0", "NCCL_IB_DISABLE=1"),
        ("/dev/nvidia-caps-imex-channels/channel0", "NCCL_NVLS_ENABLE=0"),
    ],
)
def test_rdma_and_memory_over_nvlink_are_named_before_anything_is_locked(
    rekindle: Rekindle, node: FakeGpuNode, port: int, tmp_path: Path, path: str, remedy: str
) -> None:
    rekindle.prefix = with_device(path, tmp_path / "dev")
    said = refused(rekindle, node, port, 32, *CUDA, "hold=device", f"path={path}")
    assert path in said
    assert remedy in said


def test_memory_that_others_may_use_is_named_before_anything_is_locked(
    rekindle: Rekindle, node: FakeGpuNode, port: int
) -> None:
    said = refused(rekindle, node, port, 32, *CUDA, "hold=dmabuf")
    assert "(/dmabuf:" in said
    assert "CUDA IPC" in said


def test_mig_is_named_before_anything_is_locked(rekindle: Rekindle, node: FakeGpuNode, port: int) -> None:
    node.begin(structs.replace(ONE, gpus=(structs.replace(ONE.gpus[0], mig=True),)))
    said = refused(rekindle, node, port, 32, *CUDA)
    assert "NVIDIA H200 is in MIG mode" in said
    assert "nvidia-smi -mig 0" in said


def test_mig_on_a_gpu_that_the_server_does_not_hold_is_nothing_to_it(
    rekindle: Rekindle, node: FakeGpuNode, port: int
) -> None:
    node.begin(structs.replace(TWO, gpus=(TWO.gpus[0], structs.replace(TWO.gpus[1], mig=True))))
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, flags=["--no-prove"])
    assert done.status == 0, done.stderr


def test_mps_is_named_before_anything_is_locked(
    rekindle: Rekindle, node: FakeGpuNode, port: int, tmp_path: Path
) -> None:
    (tmp_path / "control").touch()
    rekindle.env["CUDA_MPS_PIPE_DIRECTORY"] = str(tmp_path)
    said = refused(rekindle, node, port, 32, *CUDA)
    assert "MPS is on" in said


def test_too_little_memory_is_told_before_anything_is_locked(
    rekindle: Rekindle, node: FakeGpuNode, port: int
) -> None:
    said = refused(rekindle, node, port, 14, "cuda=1000000000")
    assert "not enough host memory for the state of the GPUs" in said
    assert "1,048,576,000,000,000 bytes" in said
    assert "--no-memory-check" in said
    done = rekindle.snapshot_workhorse("horse", port, "cuda=1000000000", flags=["--no-memory-check"])
    assert "the dump lacks the state of the GPU" in done.stderr, "it was tried"


def test_a_dump_without_the_gpus_state_is_refused(
    rekindle: Rekindle, node: FakeGpuNode, port: int, nothing_left: NothingLeft
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, "cuda=3072")
    assert done.status == 33, done.stderr
    assert "the dump lacks the state of the GPU" in done.stderr
    assert "the GPU held 3,221,225,472 bytes" in done.stderr
    assert rekindle("inspect", "horse").status == 12
    nothing_left()


def test_a_server_that_uses_no_gpu_is_taken_as_on_a_node_without(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 0, done.stderr
    process = process_of(rekindle)
    assert (process["cuda_pids"], process["gpus"]) == ([], [])
    assert steps(node.cuda.log()) == []
    node.describe(Gpus(), library=False, utility=False)
    assert restore("horse", port).report["outcome"] == "restored"


def test_a_server_that_uses_no_gpu_needs_no_backend(rekindle: Rekindle, node: FakeGpuNode, port: int) -> None:
    node.describe(ONE, library=False, utility=False)
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 0, done.stderr


def test_a_server_that_uses_one_needs_a_backend(
    rekindle: Rekindle, node: FakeGpuNode, port: int, tmp_path: Path
) -> None:
    node.describe(ONE, library=False, utility=False)
    rekindle.prefix = with_device("/dev/nvidia0", tmp_path / "dev")
    said = refused(rekindle, node, port, 10, "hold=device", "path=/dev/nvidia0")
    assert "cannot checkpoint and restore CUDA on this node" in said


def test_the_gpus_are_all_of_the_nodes_where_nobody_tells_which_are_held(
    rekindle: Rekindle, node: FakeGpuNode, port: int
) -> None:
    """As in a container with PIDs of its own."""
    fails = {
        f"nvmlDeviceGet{kind}RunningProcesses_v{n}": 3 for kind in ("Compute", "Graphics") for n in (2, 3)
    }
    node.nvml.describe(TWO, fails=fails)
    done = rekindle.snapshot_workhorse("horse", port, *CUDA, "cuda-idle", flags=["--no-prove"])
    assert done.status == 0, done.stderr
    assert process_of(rekindle)["gpus"] == [gpu.uuid for gpu in TWO.gpus]
    assert len(process_of(rekindle)["cuda_pids"]) == 2, "a process that has only called cuInit is none"


def test_a_device_that_a_libcuda_made_is_no_gpu(rekindle: Rekindle, tmp_path: Path) -> None:
    """Without a driver, in /proc or as a library, even where this machine has one."""
    no_driver = 'test ! -d /proc/driver || mount -t tmpfs none /proc/driver; exec "$@"'
    rekindle.prefix = [*with_device("/dev/nvidiactl", tmp_path / "dev"), "sh", "-ec", no_driver, "sh"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libnvidia-ml.so.1").touch()
    done = rekindle("doctor", "--check", "cuda", env={"LD_LIBRARY_PATH": str(tmp_path / "lib")})
    assert (done.status, done.stdout) == (0, "note  cuda       this node has no NVIDIA GPU\n"), done.stderr
