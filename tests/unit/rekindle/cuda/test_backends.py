# SPDX-License-Identifier: Apache-2.0
"""Which backend is chosen, why others are not, and what each backend does by itself."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.cuda import search
from rekindle.cuda.backend import INVALID_VALUE, NOT_INITIALIZED, Action, Backend, State, failure, holds_none
from rekindle.cuda.driver import Driver
from rekindle.cuda.search import BackendCandidate, Search
from rekindle.cuda.session import holders
from rekindle.cuda.utility import Utility
from rekindle.errors import CapabilityError, CudaError, UsageError
from rekindle.home import Home
from rekindle.node.gpu import Gpus
from restore.decide import abilities
from tests.conftest import ROOT, wait_for
from tests.fakes.cuda import UUID, FakeCuda
from tests.samples.cuda import clients

OTHER_UUID = UUID.replace("000000000000", "000000000001")


def reasons(home: Home) -> str:
    with pytest.raises(CapabilityError) as caught:
        search.find(home)
    assert caught.value.hint
    return caught.value.cause


def test_the_driver_comes_first(fake: FakeCuda, home: Home) -> None:
    with contextlib.closing(search.find(home)) as backend:
        assert backend.name == "driver"
    one, other = search.candidates(home)
    assert one == BackendCandidate(name="driver", detail="libcuda.so.1, CUDA 13.0", problem="", chosen=True)
    tool = f"{fake.place}/bin/cuda-checkpoint 580.65.06"
    assert other == BackendCandidate(name="utility", detail=tool, problem="", chosen=False)
    assert abilities.cuda_problem(home) == ""
    assert clients() == []


def test_an_older_driver_is_reached_by_the_utility(fake: FakeCuda, home: Home) -> None:
    fake.describe(driver="560.35.03")
    with fake.processes(1) as (pid,), contextlib.closing(search.find(home)) as backend:
        assert backend.name == "utility"
        assert backend.state(pid) is State.RUNNING
    one, other = search.candidates(home)
    assert (
        one.problem
        == "libcuda.so.1 has no cuCheckpointProcessGetRestoreThreadId: the driver is older than 570"
    )
    assert other.chosen


def test_too_old_a_driver_has_no_backend(fake: FakeCuda, home: Home) -> None:
    fake.describe(driver="550.144.03")
    cause = reasons(home)
    assert "older than 570" in cause
    assert "550.144.03 has no --action: it is older than 555" in cause
    assert abilities.cuda_problem(home) == cause
    assert not any(candidate.chosen for candidate in search.candidates(home))


def test_without_a_driver_there_is_no_backend(fake: FakeCuda, home: Home) -> None:
    fake.describe(library=False, utility=False)
    cause = reasons(home)
    assert "driver: " in cause
    assert "libcuda.so.1" in cause
    assert "utility: cuda-checkpoint is not on PATH" in cause


def test_a_driver_that_does_not_start_is_no_backend_for_either(fake: FakeCuda, home: Home) -> None:
    fake.describe(init=100)
    cause = reasons(home)
    assert "cuInit: CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected" in cause
    assert "utility: it starts the same driver" in cause


@pytest.mark.parametrize("name", ["driver", "utility"])
def test_a_backend_can_be_forced(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", name)
    with contextlib.closing(search.find(home)) as backend:
        assert backend.name == name
    (only,) = search.candidates(home)
    assert only.name == name
    fake.describe(driver="550.144.03")
    assert reasons(home).startswith(f"{name}: ")
    assert ";" not in reasons(home)


@pytest.mark.parametrize("variable", ["REKINDLE_CUDA_BACKEND", "REKINDLE_CUDA_DOOR"])
def test_an_unknown_backend_is_refused(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "window")
    with pytest.raises(UsageError, match=f"invalid {variable} 'window'") as caught:
        search.find(home)
    assert "driver or utility" in caught.value.hint


def test_the_older_variable_forces_a_backend_unless_the_newer_is_set(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REKINDLE_CUDA_DOOR", "utility")
    assert [each.name for each in search.candidates(home)] == ["utility"]
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", "driver")
    assert [each.name for each in search.candidates(home)] == ["driver"]


def test_a_utility_of_ones_own(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (fake.place / "bin/cuda-checkpoint").rename(tmp_path / "mine")
    monkeypatch.setenv("REKINDLE_CUDA_CHECKPOINT", str(tmp_path / "mine"))
    assert Utility.find(home).path == tmp_path / "mine"
    monkeypatch.setenv("REKINDLE_CUDA_CHECKPOINT", str(tmp_path / "none"))
    with pytest.raises(CapabilityError, match="cannot run"):
        Utility.find(home)
    (tmp_path / "none").touch(mode=0o644)
    with pytest.raises(CapabilityError, match="cannot run"):
        Utility.find(home)


def test_what_a_utility_can_do_is_remembered_until_it_changes(fake: FakeCuda, home: Home) -> None:
    assert Utility.find(home).maps
    known = home.tools / "cuda-checkpoint-help.json"
    (identity,) = json.loads(known.read_text())
    known.write_text(json.dumps({identity: "Version 1.2.3. --action"}))
    assert Utility.find(home) == Utility(path=fake.place / "bin/cuda-checkpoint", version="1.2.3", maps=False)
    known.write_text("[]")
    assert Utility.find(home).version == "580.65.06"
    fake.describe(driver="570.158.01")  # which writes it anew
    os.utime(fake.place / "bin/cuda-checkpoint", (1, 1))
    assert Utility.find(home).version == "570.158.01"


@pytest.mark.parametrize("driver", ["570.158.01", "575.57.08"])
def test_a_driver_before_580_restores_onto_the_same_gpus_only(
    fake: FakeCuda, home: Home, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.describe(driver=driver)
    for name in ("driver", "utility"):
        monkeypatch.setenv("REKINDLE_CUDA_BACKEND", name)
        with fake.processes(1) as (pid,), contextlib.closing(search.find(home)) as backend:
            fake.put(pid, "checkpointed")
            with pytest.raises(CudaError, match="onto other GPUs on this node") as caught:
                backend.restore(pid, {UUID: OTHER_UUID})
            assert "580" in caught.value.hint
            assert fake.state(pid) == "checkpointed"
            backend.restore(pid, {})
            assert fake.state(pid) == "locked"


def test_a_new_utility_with_an_old_driver_restores_onto_the_same_gpus_only(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That driver leaves the map unread (google/gvisor#14817)."""
    monkeypatch.setattr("rekindle.node.gpu.probe", lambda: Gpus(driver="575.57.08"))
    with pytest.raises(CudaError, match="onto other GPUs") as caught:
        Utility.find(home).restore(1, {UUID: OTHER_UUID})
    assert "575.57.08" in caught.value.cause


def test_unlawful_steps_are_refused(fake: FakeCuda, backend: Backend) -> None:
    with fake.processes(1) as (pid,):
        acts: list[Callable[[], None]] = [
            lambda: backend.checkpoint(pid),
            lambda: backend.restore(pid, {}),
            lambda: backend.unlock(pid),
        ]
        for act in acts:
            with pytest.raises(CudaError) as caught:
                act()
            assert caught.value.number == 401
            assert caught.value.cause == (
                "CUDA_ERROR_ILLEGAL_STATE (401): the operation cannot be performed in the present state"
            )
        backend.lock(pid, 5)
        with pytest.raises(CudaError, match="could not lock"):
            backend.lock(pid, 5)


def test_a_process_that_holds_no_cuda(fake: FakeCuda, backend: Backend) -> None:
    assert backend.restore_thread(os.getpid()) is None
    assert backend.restore_thread(2**22 - 1) is None
    with pytest.raises(CudaError) as caught:
        backend.lock(os.getpid(), 1)
    assert caught.value.number == 1
    assert "holds no CUDA" in caught.value.hint


@pytest.mark.parametrize("code", [304, 999])
def test_a_failure_is_not_taken_for_a_process_without_cuda(
    fake: FakeCuda, backend: Backend, code: int
) -> None:
    """Nor by the utility, which tells no result: the process has a restore thread."""
    with fake.processes(1) as (pid,):
        fake.describe(faults=[{"step": "restore-thread", "code": code}])
        with pytest.raises(CudaError, match="restore thread"):
            backend.restore_thread(pid)


def test_a_driver_that_fails_to_start_says_nothing_of_a_process(fake: FakeCuda, home: Home) -> None:
    utility = Utility.find(home)
    for code in (1, 3, 304):
        fake.describe(init=code)
        with pytest.raises(CudaError, match="restore thread") as caught:
            utility.restore_thread(os.getpid())
        assert caught.value.number == 0
        assert "Error initializing CUDA" in caught.value.cause
        (only,) = [each for each in search.candidates(home) if each.name == "utility"]
        assert "Error initializing CUDA" in only.problem or "which failed" in only.problem
        assert caught.value.command[0] == str(utility.path)


def test_a_process_that_has_not_started_the_driver(fake: FakeCuda, backend: Backend) -> None:
    fake.describe(faults=[{"step": "restore-thread", "code": 3}])
    assert backend.restore_thread(os.getpid()) is None


def test_a_process_that_is_starting_the_driver(tmp_path: Path) -> None:
    (tmp_path / "42/fd").mkdir(parents=True)
    (tmp_path / "42/fd/3").symlink_to("/dev/nvidiactl")
    assert holds_none(42, INVALID_VALUE, proc=tmp_path)
    assert holds_none(42, NOT_INITIALIZED, proc=tmp_path)
    assert holds_none(43, NOT_INITIALIZED, proc=tmp_path)
    (tmp_path / "42/fd/4").symlink_to("/dev/nvidia-uvm")
    assert not holds_none(42, NOT_INITIALIZED, proc=tmp_path)
    assert not holds_none(42, 999, proc=tmp_path)


def test_a_checkpointed_process_is_known_by_the_name_of_its_thread(tmp_path: Path) -> None:
    """cuda-checkpoint only says that it has found no thread; and no device is open."""
    for thread, name in (("42", "python3"), ("43", "cuda-EvtHandlr")):
        (tmp_path / "42/task" / thread).mkdir(parents=True)
        (tmp_path / "42/task" / thread / "comm").write_text(f"{name}\n")
    (tmp_path / "42/fd").mkdir()
    assert holds_none(42, 0, proc=tmp_path)
    (tmp_path / "42/task/43/comm").write_text("cuda00001400006\n")
    assert not holds_none(42, 0, proc=tmp_path)
    assert holds_none(42, NOT_INITIALIZED, proc=tmp_path)


def test_doctor_finds_out_that_the_driver_does_not_start_in_the_utility(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", "utility")
    fake.describe(init=100)
    (only,) = search.candidates(home)
    assert not only.chosen
    assert only.problem == 'Error initializing CUDA: "no CUDA-capable device is detected"'


def test_a_utility_that_says_more_than_it_should(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "tool"
    monkeypatch.setenv("REKINDLE_CUDA_CHECKPOINT", str(tool))

    def make(program: str) -> Utility:
        tool.write_text(f"#!/bin/sh\n[ $1 = --help ] && echo --action && exit\n{program}\n")
        tool.chmod(0o755)
        return Utility.find(home)

    assert make("echo 'warning: x' >&2; echo checkpointed").state(1) is State.CHECKPOINTED
    assert make("echo 42; echo 'a warning' >&2").restore_thread(1) == 42
    with pytest.raises(CudaError, match="state of process 1") as caught:
        make("echo nonsense").state(1)
    assert "'nonsense'" in caught.value.cause
    with pytest.raises(CudaError, match="restore thread") as caught:
        make("echo nonsense").restore_thread(1)
    with pytest.raises(CudaError) as caught:
        make("exit 17").unlock(1)
    assert caught.value.cause == "it exited with status 17"
    with pytest.raises(CudaError) as caught:
        make("kill -SEGV $$").unlock(1)
    assert caught.value.cause == "it exited with status 139"
    with pytest.raises(CudaError, match=r"did not unlock process 1 within 0\.5 s"):
        make("sleep 100").unlock(1, timeout_seconds=0.5)
    tool.unlink()
    with pytest.raises(CudaError) as caught:
        Utility(path=tool, version="", maps=False).unlock(1)
    assert "No such file" in caught.value.cause


def test_every_error_says_what_to_do() -> None:
    for number in (1, 2, 3, 304, 401, 600, 801):
        assert failure(Action.LOCK, 1, number, "X", "x").hint
    assert "device map" in failure(Action.RESTORE, 1, 1, "X", "x").hint
    assert "device map" not in failure(Action.CHECKPOINT, 1, 1, "X", "x").hint


def test_a_search_leaves_time_for_other_work(fake: FakeCuda, home: Home) -> None:
    fake.describe(init_seconds=1.5)
    start = time.monotonic()
    with Search(home) as search:
        assert time.monotonic() - start < 1
        time.sleep(1.5)  # the other work
        with contextlib.closing(search.backend(start=True)) as backend:
            assert backend.name == "driver"
    assert time.monotonic() - start < 3
    assert [each.step for each in fake.log()] == ["init"]


@pytest.mark.parametrize("needs_init", [False, True])
def test_calls_wait_for_the_drivers_start_only_if_they_need_it(
    fake: FakeCuda, home: Home, needs_init: bool
) -> None:
    fake.describe(init_seconds=4, needs_init=needs_init)
    with (
        fake.processes(2) as pids,
        Search(home) as search,
        contextlib.closing(search.backend()) as backend,
    ):
        start = time.monotonic()
        assert holders(backend, pids) == pids
        assert (time.monotonic() - start > 3) is needs_init
    assert sum(each.step == "init" for each in fake.log()) == 1


def test_the_driver_shows_every_gpu_whatever_this_command_may_use(
    fake: FakeCuda, home: Home, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its map must name every GPU, not only those that CUDA_VISIBLE_DEVICES names."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with fake.processes(1) as (pid,), contextlib.closing(search.find(home)) as found:
        assert found.state(pid) is State.RUNNING
    assert {each.visible for each in fake.log() if each.step == "state"} == {None}


@pytest.mark.parametrize(
    ("driver", "library", "utility", "expected"),
    [
        ("580.65.06", True, True, ()),
        ("580.65.06", True, False, ()),
        ("580.65.06", False, True, ()),
        ("560.35.03", True, True, ()),
        (
            "560.35.03",
            True,
            False,
            ("driver: libcuda.so.1 has no cuCheckpoint", "utility: cuda-checkpoint is not"),
        ),
        ("550.144.03", True, True, ("older than 570", "utility: ")),
        ("580.65.06", False, False, ("driver: ", "utility: cuda-checkpoint is not on PATH")),
    ],
)
def test_a_search_knows_some_problems_before_the_driver_has_started(
    fake: FakeCuda, home: Home, driver: str, library: bool, utility: bool, expected: tuple[str, ...]
) -> None:
    fake.describe(driver=driver, library=library, utility=utility, init_seconds=30)
    start = time.monotonic()
    with Search(home) as search:
        problem = search.problem()
    assert time.monotonic() - start < 10
    assert bool(problem) is bool(expected)
    assert all(words in problem for words in expected), problem
    if expected:
        assert problem == reasons(home)


@pytest.mark.parametrize("name", ["driver", "utility"])
def test_a_search_tells_of_the_forced_backend_alone(
    fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", name)
    fake.describe(library=name != "driver", utility=name != "utility")
    with Search(home) as search:
        assert search.problem().startswith(f"{name}: ")
    fake.describe(library=name == "driver", utility=name == "utility")
    with Search(home) as search:
        assert search.problem() == ""


def test_a_search_that_has_told_leads_to_the_backend(fake: FakeCuda, home: Home) -> None:
    with Search(home) as search:
        assert search.problem() == ""
        with contextlib.closing(search.backend(start=True)) as backend:
            assert backend.name == "driver"
    assert [each.step for each in fake.log()] == ["init"]


def test_a_driver_that_does_not_start_is_found_out_at_the_backend(fake: FakeCuda, home: Home) -> None:
    fake.describe(init=100, init_seconds=0.5)
    with Search(home) as search:
        assert search.problem() == ""
        with pytest.raises(CapabilityError, match="cannot checkpoint and restore") as caught:
            search.backend(start=True)
    assert "CUDA_ERROR_NO_DEVICE" in caught.value.cause


def test_a_call_that_needs_a_driver_that_does_not_start_fails(fake: FakeCuda, home: Home) -> None:
    fake.describe(init=100, init_seconds=0.5, needs_init=True)
    with Search(home) as search, contextlib.closing(search.backend()) as backend:
        with pytest.raises(CudaError, match="could not report the restore thread") as caught:
            backend.restore_thread(os.getpid())
        assert "CUDA_ERROR_NO_DEVICE" in caught.value.cause


def test_a_search_that_is_given_up_leaves_nothing(fake: FakeCuda, home: Home) -> None:
    with Search(home):
        fake.wait_for("init")
        assert clients()
    assert not clients()
    fake.describe(init_seconds=30)
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        give_up(home, fake)
    assert time.monotonic() - start < 10
    assert not clients()


def give_up(home: Home, fake: FakeCuda) -> None:
    with Search(home):
        fake.wait_for("init", count=2)
        raise ZeroDivisionError


def test_the_driver_starts_once_for_all_calls(fake: FakeCuda, home: Home) -> None:
    with fake.processes(3) as pids, contextlib.closing(search.find(home)) as backend:
        for _ in range(2):
            assert holders(backend, pids) == pids
    assert sum(each.step == "init" for each in fake.log()) == 1


def test_calls_for_several_processes_go_on_at_once(fake: FakeCuda, backend: Backend) -> None:
    fake.describe(seconds={"lock": 1.0})
    with fake.processes(4) as pids:
        start = time.monotonic()
        threads = [threading.Thread(target=backend.lock, args=[pid, 10]) for pid in pids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start < 3
        assert {fake.state(pid) for pid in pids} == {"locked"}


def test_a_call_waits_for_the_one_before_of_the_same_process(fake: FakeCuda, home: Home) -> None:
    with fake.processes(1) as (pid,), contextlib.closing(search.find(home)) as backend:
        backend.lock(pid, 5)
        fake.describe(seconds={"checkpoint": 1.0})
        with pytest.raises(CudaError, match="did not checkpoint") as caught:
            backend.checkpoint(pid, timeout_seconds=0.3)
        assert caught.value.cause == "the driver has not finished"
        with pytest.raises(CudaError, match="did not unlock") as caught:
            backend.unlock(pid, timeout_seconds=0.1)
        assert caught.value.cause == "the driver has not finished its checkpoint"
        assert backend.state(pid) is State.CHECKPOINTED


def test_a_client_that_was_killed_is_started_anew(fake: FakeCuda, home: Home) -> None:
    with fake.processes(1) as (pid,), contextlib.closing(search.find(home)) as backend:
        (client,) = clients()
        os.kill(client, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{client}/cmdline").read_bytes(), 5)  # it is a zombie now
        time.sleep(0.1)
        assert backend.state(pid) is State.RUNNING
        assert clients() != [client]


def test_a_driver_that_crashes_the_client_is_told(fake: FakeCuda, home: Home) -> None:
    fake.describe(init_seconds=30)
    with contextlib.closing(Driver()) as driver:
        (client,) = clients()
        os.kill(client, signal.SIGSEGV)
        driver.wait()
        assert "exited with status -11" in driver.problem


def test_the_client_goes_with_its_backend(fake: FakeCuda, home: Home) -> None:
    backend = search.find(home)
    assert clients()
    backend.close()
    backend.close()
    assert not clients()
    before = set(os.listdir("/proc/self/fd"))
    search.find(home).close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_client_outlives_the_thread_that_started_it(fake: FakeCuda, home: Home) -> None:
    found: list[Backend] = []
    thread = threading.Thread(target=lambda: found.append(search.find(home)))
    thread.start()
    thread.join()
    with fake.processes(1) as (pid,), contextlib.closing(found[0]) as backend:
        time.sleep(0.2)
        assert backend.state(pid) is State.RUNNING
    assert sum(each.step == "init" for each in fake.log()) == 1


PROGRAM = """
import sys, threading, time
from pathlib import Path
from rekindle.cuda.search import find
from rekindle.home import Home
backend = find(Home(Path(sys.argv[1])))
pid = int(sys.argv[2])
backend.state(pid)
threading.Thread(target=backend.lock, args=[pid, 10]).start()
time.sleep(1000)
"""


@pytest.mark.parametrize("busy", [False, True])
def test_the_client_goes_with_its_command_but_not_in_the_middle_of_a_call(
    fake: FakeCuda, home: Home, busy: bool
) -> None:
    fake.describe(seconds={"lock": 0.7} if busy else {})
    with fake.processes(1) as (pid,):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(home.root), str(pid)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as command:
            fake.wait_for("lock", "begin" if busy else "end")
            (client,) = clients(command.pid)
            command.kill()
        wait_for(lambda: not Path(f"/proc/{client}").exists(), 5)
        assert fake.state(pid) == "locked"


def test_a_client_whose_parent_is_gone_already_does_nothing(fake: FakeCuda) -> None:
    from rekindle.cuda import client

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", client.__file__, str(theirs.fileno()), "1"],
            pass_fds=[theirs.fileno()],
            timeout=20,
            check=False,
        )
    assert done.returncode == 1
    assert fake.log() == []
