# SPDX-License-Identifier: Apache-2.0
"""`rekindle doctor` says which CUDA backend there is, and brings back what a killed command left."""

import signal
from pathlib import Path

import pytest
from msgspec import structs

from rekindle.cuda import drivers
from rekindle.home import Home
from rekindle.journal import CUDA_JOURNAL
from rekindle.node.gpu import Gpus
from tests.conftest import ROOT, Rekindle
from tests.fakes import nodes
from tests.fakes.cuda import FakeCuda
from tests.fakes.nvml import FakeNvml
from tests.samples.cuda import session_command


@pytest.fixture(scope="module")
def built_nvml(tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    return FakeNvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def node(built_nvml: FakeNvml, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A node with a GPU, of the driver that `fake` is."""
    built_nvml.describe(nodes.H100)
    for name, value in built_nvml.environment.items():
        monkeypatch.setenv(name, value)
    return built_nvml


@pytest.fixture
def doctor(rekindle: Rekindle, home: Home) -> Rekindle:
    return rekindle


def leave_locked(fake: FakeCuda, home: Home, pids: list[int]) -> Path:
    """A command that is killed between the locks and the checkpoints; returns its work directory."""
    fake.describe(seconds={"checkpoint": 0.3})
    with session_command(home, pids) as command:
        fake.wait_for("checkpoint")
        command.send_signal(signal.SIGKILL)
    fake.wait_for("checkpoint", "end", count=len(pids))
    fake.describe()
    (directory,) = home.run.iterdir()
    return directory


def test_a_node_without_a_gpu_needs_none(node: FakeNvml, doctor: Rekindle, fake: FakeCuda) -> None:
    node.describe(Gpus())
    done = doctor("doctor", "--check", "cuda")
    assert done.status == 0
    assert done.stdout == "note  cuda       this node has no NVIDIA GPU\n"
    assert fake.log() == []


def test_the_backend_is_told(node: FakeNvml, doctor: Rekindle, fake: FakeCuda) -> None:
    done = doctor("doctor", "--check", "cuda")
    assert done.status == 0, done.stderr
    assert done.stdout.splitlines() == [
        "ok    cuda       driver: libcuda.so.1, CUDA 13.0",
        f"ok    cuda       utility: {fake.place}/bin/cuda-checkpoint 580.65.06, not needed",
    ]


def test_what_is_known_of_the_driver_is_told(node: FakeNvml, doctor: Rekindle, fake: FakeCuda) -> None:
    node.describe(structs.replace(nodes.H100, driver="595.71.05"), persistence=False)
    fake.describe(driver="595.71.05")
    done = doctor("doctor", "--check", "cuda")
    assert done.status == 0, done.stderr
    assert (
        "note  cuda       driver 595.71.05: hosts hung after a live restored process was killed"
        in done.stdout
    )
    name = f"{nodes.H100.gpus[0].name} ({nodes.H100.gpus[0].uuid})"
    assert f"note  cuda       persistence mode is off: {name} is shut down" in done.stdout
    assert "ok    cuda       driver: libcuda.so.1" in done.stdout


def test_every_note_on_a_driver_is_in_its_table() -> None:
    page = " ".join((ROOT / "docs/gpu/drivers.md").read_text().split())
    for note in drivers.NOTES:
        assert note.text in page
    assert [note.first for note in drivers.notes("580.65.06")] == []
    assert drivers.notes("") == []


def test_why_a_backend_is_not_taken_is_told(node: FakeNvml, doctor: Rekindle, fake: FakeCuda) -> None:
    fake.describe(driver="565.57.01")
    done = doctor("doctor", "--check", "cuda")
    assert done.status == 0, done.stderr
    assert "note  cuda       driver: libcuda.so.1 has no cuCheckpoint" in done.stdout
    assert f"ok    cuda       utility: {fake.place}/bin/cuda-checkpoint 565.57.01\n" in done.stdout


def test_a_node_with_a_gpu_and_no_backend_lacks_one(node: FakeNvml, doctor: Rekindle, fake: FakeCuda) -> None:
    fake.describe(driver="550.144.03")
    done = doctor("doctor", "--check", "cuda")
    assert done.status == 10
    assert done.stdout.count("FAIL  cuda") == 2
    assert "update the NVIDIA driver to 580" in done.stdout


def test_what_a_killed_command_left_is_told_kept_and_repaired(
    node: FakeNvml, doctor: Rekindle, fake: FakeCuda, home: Home
) -> None:
    with fake.processes(3) as pids:
        directory = leave_locked(fake, home, pids)
        (directory / "dump").mkdir()
        for _ in range(2):
            assert doctor("pull", "127.0.0.1:1/none:1").status == 40  # a command as any other
            assert [path.name for path in directory.iterdir()] == [CUDA_JOURNAL]
        done = doctor("doctor", "--check", "cuda")
        assert done.status == 0
        assert f"note  cuda       a killed command may have left a server without its GPUs: {directory}" in (
            done.stdout
        )
        assert "→ rekindle doctor --repair" in done.stdout
        assert {fake.state(pid) for pid in pids} == {"checkpointed"}

        done = doctor("doctor", "--repair", "--check", "disk")
        assert done.status == 0, done.stderr
        for pid in pids:
            assert f"process {pid} was checkpointed and is running again\n" in done.stdout
        assert f"removed the work directory of a killed command: {directory}" in done.stdout
        assert {fake.state(pid) for pid in pids} == {"running"}
        assert not directory.exists()
        assert doctor("doctor", "--repair", "--json", "--check", "disk").json["repaired"] == []


def test_what_cannot_be_repaired_stays_and_is_a_lack(
    node: FakeNvml, doctor: Rekindle, fake: FakeCuda, home: Home
) -> None:
    with fake.processes(2) as pids:
        directory = leave_locked(fake, home, pids)
        fake.describe(library=False, utility=False)
        done = doctor("doctor", "--repair", "--json", "--check", "disk")
        assert done.status == 10
        assert done.json["ok"] is False
        (line,) = done.json["repaired"]
        assert f"cannot repair the servers in {directory}/{CUDA_JOURNAL}: " in line
        assert "cuda-checkpoint is not on PATH" in line
        fake.describe(faults=[{"step": "restore", "pid": pids[0], "code": 2}])
        done = doctor("doctor", "--repair", "--check", "disk")
        assert done.status == 10
        assert f"process {pids[0]} could not be rolled back: CUDA_ERROR_OUT_OF_MEMORY" in done.stdout
        assert f"process {pids[1]} was checkpointed and is running again" in done.stdout
        assert directory.exists()
    assert doctor("doctor", "--repair", "--check", "disk").status == 0  # the server is gone
    assert not directory.exists()


def test_what_a_living_command_is_at_is_left_to_it(
    node: FakeNvml, doctor: Rekindle, fake: FakeCuda, home: Home
) -> None:
    with fake.processes(2) as pids, session_command(home, pids) as command:
        assert command.stdout
        assert command.stdout.readline() == "checkpointed\n"
        done = doctor("doctor", "--repair", "--check", "cuda")
        assert done.status == 0
        assert "process" not in done.stdout
        assert {fake.state(pid) for pid in pids} == {"checkpointed"}
        command.terminate()
        assert command.wait(30) == 143
        assert {fake.state(pid) for pid in pids} == {"running"}
