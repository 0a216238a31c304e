# SPDX-License-Identifier: Apache-2.0
"""The CUDA processes of a server are all checkpointed, or all as they were found; whatever happens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rekindle.cell import Cell, Command, Network
from rekindle.cell.processes import host_pids
from rekindle.cuda import search
from rekindle.cuda.backend import Backend, State
from rekindle.cuda.keep import kept_initialized
from rekindle.cuda.session import Session, holders, repair
from rekindle.errors import CapabilityError, CudaError
from rekindle.home import Home
from rekindle.journal import CUDA_JOURNAL, unfinished
from tests.conftest import wait_for, workhorse
from tests.fakes.cuda import UUID, FakeCuda, ordered
from tests.samples.cuda import clients, session_command

OTHER_UUID = UUID.replace("000000000000", "000000000001")
THIRD_UUID = UUID.replace("000000000000", "000000000002")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "cuda.json"


@pytest.fixture
def pids(fake: FakeCuda) -> Iterator[list[int]]:
    with fake.processes(4) as found:
        yield found


def states(fake: FakeCuda, pids: list[int]) -> set[str]:
    return {fake.state(pid) for pid in pids}


def steps(fake: FakeCuda, pid: int) -> list[str]:
    """What was done to a process with success, in order."""
    changes = (each for each in fake.log() if each.event == "end" and each.before != each.after)
    return [each.step for each in changes if each.pid == pid]


def test_all_are_locked_before_any_is_checkpointed_and_restored_before_any_is_unlocked(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    fake.describe(seconds={"lock": 0.05, "checkpoint": 0.05, "restore": 0.05})
    with Session(backend, pids, journal) as session:
        session.checkpoint_all(20)
        assert states(fake, pids) == {"checkpointed"}
        assert journal.exists()
        session.restore_all({})
        assert states(fake, pids) == {"running"}
        assert not journal.exists()
    assert ordered(fake.log(), before="lock", after="checkpoint")
    assert ordered(fake.log(), before="checkpoint", after="restore")
    assert ordered(fake.log(), before="restore", after="unlock")
    assert {each.backend for each in fake.log()} == {backend.name}
    for pid in pids:
        assert steps(fake, pid) == ["lock", "checkpoint", "restore", "unlock"]


def test_processes_are_dealt_with_at_once(fake: FakeCuda, backend: Backend, pids: list[int]) -> None:
    fake.describe(seconds={"checkpoint": 1.0})
    Session(backend, pids).checkpoint_all(20)
    times = [each.time for each in fake.log() if each.step == "checkpoint"]
    assert max(times) - min(times) < 3  # and not four


def test_the_journal_is_written_before_the_first_lock(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    fake.describe(seconds={"lock": 1.0})
    thread = threading.Thread(target=Session(backend, pids, journal).checkpoint_all, args=[20])
    thread.start()
    fake.wait_for("lock")
    written = json.loads(journal.read_text())
    assert states(fake, pids) == {"running"}
    thread.join()
    assert [each["pid"] for each in written["processes"]] == pids
    assert {each["state"] for each in written["processes"]} == {"running"}
    start = Path(f"/proc/{pids[0]}/stat").read_text().split()[21]
    assert written["processes"][0]["began"] == int(start)
    assert written["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert journal.stat().st_mode & 0o777 == 0o600


def test_who_holds_cuda_is_told_by_the_restore_thread(
    fake: FakeCuda, backend: Backend, pids: list[int]
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as coordinator:
        try:
            fake.describe(coordinators=[coordinator.pid])
            assert backend.state(coordinator.pid) is State.RUNNING  # which is the trap
            assert holders(backend, [coordinator.pid, *pids, os.getpid(), 2**22 - 1]) == pids
        finally:
            coordinator.kill()


def test_a_process_that_has_only_called_cu_init_is_left_out(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    """It has a restore thread, but its lock says that CUDA is not initialized (NVIDIA/cuda-checkpoint#10)."""
    with fake.processes(1, idle=True) as (idle,):
        assert holders(backend, [idle, *pids]) == [idle, *pids]
        with Session(backend, [idle, *pids], journal) as session:
            assert session.checkpoint_all(20, maybe_idle=[idle, pids[0]]) == [idle]
            assert states(fake, pids) == {"checkpointed"}
            assert session.rollback() == []
        assert states(fake, pids) == {"running"}
        with pytest.raises(CudaError, match=f"could not lock process {idle}") as caught:
            Session(backend, [idle, *pids]).checkpoint_all(20)  # as NVML says, it holds memory
        assert caught.value.number == 3
        assert states(fake, pids) == {"running"}


def test_gpus_are_kept_initialized_while_no_process_holds_them(
    fake: FakeCuda, backend: Backend, pids: list[int], tmp_path: Path
) -> None:
    """Without persistence mode, the last user of a GPU dies with it (NVIDIA/cuda-checkpoint#25)."""
    dev = tmp_path / "dev"
    dev.mkdir()
    (dev / "nvidia0").touch()
    fake.describe(last_user_of=str(dev / "nvidia0"))
    with kept_initialized(dev):
        with Session(backend, pids[:3]) as session:
            session.checkpoint_all(20)
        assert states(fake, pids[:3]) == {"checkpointed"}
    with pytest.raises(CudaError, match=f"could not checkpoint process {pids[3]}"):
        Session(backend, pids[3:]).checkpoint_all(20)
    assert not is_alive(pids[3])


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_restore_without_memory_cannot_be_repeated(
    fake: FakeCuda, backend: Backend, pids: list[int]
) -> None:
    """Whatever is freed later (NVIDIA/cuda-checkpoint#44)."""
    Session(backend, pids[:1]).checkpoint_all(20)
    fake.describe(free_bytes=1000)
    with pytest.raises(CudaError, match="could not restore") as caught:
        Session(backend, pids[:1]).restore_all({}, roll_back=False)
    assert caught.value.number == 2
    assert "cannot be repeated" in caught.value.hint
    fake.describe()
    with pytest.raises(CudaError, match="could not restore") as caught:
        Session(backend, pids[:1]).restore_all({}, roll_back=False)
    assert caught.value.number == 304
    assert "cannot be repeated" in caught.value.hint


def test_a_lock_that_times_out_leaves_every_process_running(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    fake.describe(busy=[pids[2]])
    start = time.monotonic()
    with pytest.raises(CudaError, match=f"could not lock process {pids[2]}") as caught:
        Session(backend, pids, journal).checkpoint_all(1.5)
    assert time.monotonic() - start < 10
    assert "CUDA_ERROR_NOT_READY (600)" in caught.value.cause
    assert caught.value.number == 600
    assert "did not finish" in caught.value.hint
    assert states(fake, pids) == {"running"}
    assert "checkpoint" not in {each.step for each in fake.log()}
    assert not journal.exists()


def test_a_checkpoint_that_fails_on_the_third_of_four_rolls_all_back(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    fake.describe(faults=[{"step": "checkpoint", "nth": 3, "code": 2}])
    with pytest.raises(CudaError, match="could not checkpoint") as caught:
        Session(backend, pids, journal).checkpoint_all(20)
    assert caught.value.cause == "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
    assert "free memory" in caught.value.hint
    assert states(fake, pids) == {"running"}
    assert ordered(fake.log(), before="restore", after="unlock")
    assert sorted(len(steps(fake, pid)) for pid in pids) == [2, 4, 4, 4]
    assert not journal.exists()


@pytest.mark.parametrize("step", ["state", "lock", "checkpoint"])
def test_a_failure_at_any_step_leaves_all_as_it_was(
    fake: FakeCuda, backend: Backend, pids: list[int], step: str
) -> None:
    fake.describe(faults=[{"step": step, "nth": 2, "code": 999}])
    with pytest.raises(CudaError, match=r"CUDA could not") as caught:
        Session(backend, pids).checkpoint_all(20)
    assert caught.value.cause == "CUDA_ERROR_UNKNOWN (999): unknown error"
    assert states(fake, pids) == {"running"}


@pytest.mark.parametrize("step", ["restore", "unlock"])
def test_a_restore_that_fails_leaves_all_checkpointed(
    fake: FakeCuda, backend: Backend, pids: list[int], step: str
) -> None:
    """As CRIU has restored them: each was found so."""
    for pid in pids:
        fake.put(pid, "checkpointed")
    fake.describe(faults=[{"step": step, "nth": 2, "code": 999}])
    with pytest.raises(CudaError, match=f"could not {step} process"):
        Session(backend, pids).restore_all({})
    assert states(fake, pids) == {"checkpointed"}


def test_every_failure_is_told(fake: FakeCuda, backend: Backend, pids: list[int]) -> None:
    fake.describe(faults=[{"step": "lock", "pid": pid, "code": 801} for pid in pids[1:3]])
    with pytest.raises(CudaError) as caught:
        Session(backend, pids).checkpoint_all(20)
    assert str(pids[1]) in caught.value.message
    assert str(pids[2]) in caught.value.cause
    assert "managed memory" in caught.value.hint


def test_a_checkpoint_without_effect_is_noticed(fake: FakeCuda, backend: Backend, pids: list[int]) -> None:
    """The classic: a dump that silently lacks what was on the GPU."""
    fake.describe(faults=[{"step": "checkpoint", "pid": pids[1], "code": 0}])
    with pytest.raises(CudaError, match=f"could not checkpoint process {pids[1]}") as caught:
        Session(backend, pids).checkpoint_all(20)
    assert "still locked" in caught.value.cause
    assert states(fake, pids) == {"running"}


@pytest.mark.parametrize("found", ["locked", "checkpointed"])
def test_states_that_were_found_are_kept(
    fake: FakeCuda, backend: Backend, pids: list[int], found: str
) -> None:
    fake.put(pids[0], found)
    fake.describe(faults=[{"step": "checkpoint", "pid": pids[3], "code": 999}])
    with pytest.raises(CudaError):
        Session(backend, pids).checkpoint_all(20)
    assert fake.state(pids[0]) == found
    assert states(fake, pids[1:]) == {"running"}
    if found == "checkpointed":
        assert steps(fake, pids[0]) == []
    fake.describe()
    with Session(backend, pids) as session:
        session.checkpoint_all(20)
        assert states(fake, pids) == {"checkpointed"}
        assert session.rollback() == []
    assert fake.state(pids[0]) == found
    assert states(fake, pids[1:]) == {"running"}


def test_a_process_in_which_cuda_has_failed_is_refused_at_once(
    fake: FakeCuda, backend: Backend, pids: list[int]
) -> None:
    fake.put(pids[1], "failed")
    with pytest.raises(CudaError, match=f"process {pids[1]} has failed"):
        Session(backend, pids).checkpoint_all(20)
    assert {each.step for each in fake.log()} <= {"init", "restore-thread", "state"}


def test_what_cannot_be_rolled_back_is_told_and_stays_in_the_journal(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    fake.describe(
        faults=[
            {"step": "checkpoint", "pid": pids[2], "code": 999, "state": "failed"},
            {"step": "unlock", "pid": pids[3], "code": 304, "times": 1},
        ]
    )
    session = Session(backend, pids, journal)
    with pytest.raises(CudaError) as caught:
        session.checkpoint_all(20)
    assert caught.value.cause.startswith("CUDA_ERROR_UNKNOWN (999)")
    assert f"process {pids[2]} could not be rolled back: CUDA in it has failed" in caught.value.cause
    assert f"process {pids[3]} could not be rolled back: CUDA_ERROR_OPERATING_SYSTEM" in caught.value.cause
    assert "doctor --repair" in caught.value.cause
    assert states(fake, pids[:2]) == {"running"}
    assert [each["pid"] for each in json.loads(journal.read_text())["processes"]] == pids[2:]
    (left,) = session.rollback()
    assert str(pids[2]) in left
    assert fake.state(pids[3]) == "running"


def test_a_process_that_dies_meanwhile_does_not_keep_the_others(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    """As when the driver crashes it (NVIDIA/cuda-checkpoint#58)."""
    fake.describe(seconds={"checkpoint": 0.5})
    thread = threading.Thread(target=kill_when, args=[fake, "checkpoint", pids[1]])
    thread.start()
    with pytest.raises(CudaError, match=f"process {pids[1]}") as caught:
        Session(backend, pids, journal).checkpoint_all(20)
    thread.join()
    assert "rolled back" not in caught.value.cause
    assert states(fake, [pids[0], *pids[2:]]) == {"running"}
    assert not journal.exists()


def kill_when(fake: FakeCuda, step: str, pid: int) -> None:
    fake.wait_for(step)
    os.kill(pid, signal.SIGKILL)


def test_a_process_that_has_ended_before_is_refused(fake: FakeCuda, backend: Backend) -> None:
    with fake.processes(1) as (pid,):
        pass
    with pytest.raises(CudaError, match="could not report the state"):
        Session(backend, [pid]).checkpoint_all(5)


def checkpoint_and_fail(session: Session) -> None:
    with session:
        session.checkpoint_all(20)
        raise ZeroDivisionError


def test_leaving_with_an_exception_rolls_back_and_leaving_without_does_not(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        checkpoint_and_fail(Session(backend, pids, journal))
    assert states(fake, pids) == {"running"}
    assert not journal.exists()
    with Session(backend, pids, journal) as session:
        session.checkpoint_all(20)
    assert states(fake, pids) == {"checkpointed"}
    assert not journal.exists()


def test_an_error_of_ours_tells_what_was_left_also_if_it_is_another(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    fake.describe(faults=[{"step": "restore", "pid": pids[0], "code": 2}])
    with pytest.raises(ZeroDivisionError) as caught:
        checkpoint_and_fail(Session(backend, pids, journal))
    (note,) = caught.value.__notes__
    assert f"process {pids[0]} could not be rolled back: CUDA_ERROR_OUT_OF_MEMORY" in note
    assert fake.state(pids[0]) == "checkpointed"
    assert states(fake, pids[1:]) == {"running"}


@pytest.mark.parametrize("step", ["state", "lock", "checkpoint"])
def test_a_signal_in_the_middle_lets_what_is_going_on_finish_and_rolls_back(
    fake: FakeCuda, backend: Backend, home: Home, pids: list[int], step: str
) -> None:
    fake.describe(seconds={step: 0.4})
    with session_command(home, pids) as command:
        fake.wait_for(step)
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 128 + signal.SIGTERM
        assert command.stdout
        assert command.stdout.read() == "\n"
    assert states(fake, pids) == {"running"}
    begun = [each for each in fake.log() if each.event == "begin"]
    assert len(fake.log()) == 2 * len(begun) - sum(each.step == "init" for each in begun)
    assert not list(home.run.iterdir())


def test_a_signal_while_it_is_checkpointed_rolls_back(
    fake: FakeCuda, backend: Backend, home: Home, pids: list[int]
) -> None:
    with session_command(home, pids) as command:
        assert command.stdout
        assert command.stdout.readline() == "checkpointed\n"
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 128 + signal.SIGTERM
    assert states(fake, pids) == {"running"}


def test_a_second_signal_does_not_cut_the_rollback_off(
    fake: FakeCuda, backend: Backend, home: Home, pids: list[int]
) -> None:
    fake.describe(seconds={"checkpoint": 0.3, "restore": 0.3, "unlock": 0.3})
    with session_command(home, pids) as command:
        for step in ("checkpoint", "restore", "unlock"):
            fake.wait_for(step)
            command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 128 + signal.SIGTERM
    assert states(fake, pids) == {"running"}


def test_a_call_that_hangs_meets_the_deadline_and_the_others_are_rolled_back(
    fake: FakeCuda, backend: Backend, pids: list[int], journal: Path
) -> None:
    fake.describe(faults=[{"step": "checkpoint", "pid": pids[1], "hang": True}])
    start = time.monotonic()
    with pytest.raises(CudaError, match=f"did not checkpoint process {pids[1]} within") as caught:
        Session(backend, pids, journal, rollback_step_seconds=1.5).checkpoint_all(2)
    assert time.monotonic() - start < 15
    assert states(fake, [pids[0], *pids[2:]]) == {"running"}
    if backend.name == "driver":  # which is still at it; the utility was ended
        assert (
            f"process {pids[1]} could not be rolled back: the driver has not finished its"
            in caught.value.cause
        )
        assert journal.exists()
    else:
        assert fake.state(pids[1]) == "running"


def test_what_was_late_is_waited_for_before_it_is_undone(
    fake: FakeCuda, home: Home, pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large GPU takes its time; the driver is not interrupted, and then all is undone."""
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", "driver")
    fake.describe(seconds={"checkpoint": 2.0})
    with contextlib.closing(search.find(home)) as backend:
        with pytest.raises(CudaError, match="did not checkpoint"):
            Session(backend, pids).checkpoint_all(1.5)
        assert states(fake, pids) == {"running"}
        for pid in pids:
            assert steps(fake, pid) == ["lock", "checkpoint", "restore", "unlock"]


def test_no_step_begins_after_the_deadline(fake: FakeCuda, backend: Backend, pids: list[int]) -> None:
    fake.describe(seconds={"state": 0.6})
    with pytest.raises(CudaError, match=r"did not lock process \d+ within 0.5 s"):
        Session(Slow(backend), pids[:1]).checkpoint_all(0.5)
    assert "lock" not in {each.step for each in fake.log()}


class Slow:
    """A backend that looks at no timeout."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def state(self, pid: int, *, timeout_seconds: float = 0.0) -> State:
        return self._backend.state(pid)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def test_the_client_dies_in_the_middle(
    fake: FakeCuda, home: Home, pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was at is lost; a new one undoes what was done."""
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", "driver")
    fake.describe(seconds={"checkpoint": 1.0})
    with contextlib.closing(search.find(home)) as backend:
        (client,) = clients()
        thread = threading.Thread(target=kill_when, args=[fake, "checkpoint", client])
        thread.start()
        with pytest.raises(CudaError, match="could not checkpoint process") as caught:
            Session(backend, pids).checkpoint_all(20)
        thread.join()
        assert "client exited with status -9" in caught.value.cause
        assert states(fake, pids) == {"running"}
        assert clients() != [client]
    assert sum(each.step == "init" for each in fake.log()) == 2


@pytest.mark.parametrize("step", ["lock", "checkpoint"])
def test_a_command_that_was_killed_is_repaired(
    fake: FakeCuda, backend: Backend, home: Home, pids: list[int], step: str
) -> None:
    fake.describe(seconds={step: 0.4})
    with session_command(home, pids) as command:
        fake.wait_for(step)
        command.kill()
    (directory,) = home.run.iterdir()
    journal = directory / CUDA_JOURNAL
    assert unfinished(journal)
    fake.wait_for(step, "end", count=4)  # what the driver was at is finished
    assert states(fake, pids) <= {"locked", "checkpointed"}
    done = repair(journal, lambda: search.find(home))
    assert len(done) == 4
    was = {"lock": "locked", "checkpoint": "checkpointed"}[step]
    assert set(done) == {f"process {pid} was {was} and is running again" for pid in pids}
    assert states(fake, pids) == {"running"}
    assert not journal.exists()


def test_a_journal_of_the_dead_is_passed_over(
    fake: FakeCuda, home: Home, journal: Path, pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", "utility")

    def never() -> Backend:
        pytest.fail("there is nothing to do")

    with contextlib.closing(search.find(home)) as backend, fake.processes(2) as dead:
        session = Session(backend, dead, journal)
        session.checkpoint_all(20)
        content = json.loads(journal.read_text())
    documents: tuple[object, ...] = (
        content,
        {**content, "processes": [{**content["processes"][0], "pid": pids[0]}]},  # the PID of another one
        {**content, "boot": "another", "processes": []},
        {**content, "schema": "another"},
        [],
        {**content, "processes": [{"pid": "1"}]},
    )
    for document in documents:
        journal.write_text(json.dumps(document))
        assert not unfinished(journal)
        assert repair(journal, never) == []
        assert not journal.exists()
    for text in ("", "{", "\0" * 100):
        journal.write_text(text)
        assert repair(journal, never) == []
    assert repair(journal, never) == []  # there is none
    assert states(fake, pids) == {"running"}


def test_a_repair_does_what_it_can_and_again_what_is_left(
    fake: FakeCuda, backend: Backend, home: Home, pids: list[int], journal: Path
) -> None:
    fake.put(pids[1], "locked")
    session = Session(backend, pids, journal)
    session.checkpoint_all(20)
    fake.describe(faults=[{"step": "restore", "pid": pids[0], "code": 2, "times": 1}])
    first, *others = repair(journal, lambda: search.find(home))
    assert first == (
        f"process {pids[0]} could not be rolled back: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
    )
    assert len(others) == 3
    assert fake.state(pids[1]) == "locked"
    assert states(fake, pids[2:]) == {"running"}
    assert unfinished(journal)
    assert repair(journal, lambda: search.find(home)) == [
        f"process {pids[0]} was checkpointed and is running again"
    ]
    assert not journal.exists()


def test_a_repair_without_a_backend_leaves_the_journal(
    fake: FakeCuda, backend: Backend, home: Home, pids: list[int], journal: Path
) -> None:
    Session(backend, pids, journal).checkpoint_all(20)
    fake.describe(library=False, utility=False)
    with pytest.raises(CapabilityError):
        repair(journal, lambda: search.find(home))
    assert unfinished(journal)


def test_a_restore_onto_other_gpus(fake: FakeCuda, backend: Backend) -> None:
    fake.describe(gpus=[UUID, OTHER_UUID, THIRD_UUID])
    with fake.processes(2, uuids=[UUID, OTHER_UUID]) as pids:
        with Session(backend, pids) as session:
            session.checkpoint_all(20)
            session.restore_all({UUID: THIRD_UUID, OTHER_UUID: OTHER_UUID})
        for pid in pids:
            assert fake.held(pid)["uuids"] == [THIRD_UUID, OTHER_UUID]
            assert fake.state(pid) == "running"


@pytest.mark.parametrize(
    "device_map",
    [
        {UUID: THIRD_UUID},  # it does not name every GPU
        {UUID: THIRD_UUID, OTHER_UUID: THIRD_UUID},
        {UUID: UUID, OTHER_UUID: OTHER_UUID, THIRD_UUID: THIRD_UUID},
        {},  # and here are fewer
    ],
)
def test_a_device_map_that_does_not_fit(fake: FakeCuda, backend: Backend, device_map: dict[str, str]) -> None:
    with fake.processes(2, uuids=[UUID, OTHER_UUID]) as pids:
        for pid in pids:
            fake.put(pid, "checkpointed")
        fake.describe(gpus=[THIRD_UUID] if not device_map else [UUID, OTHER_UUID, THIRD_UUID])
        with pytest.raises(CudaError, match="could not restore") as caught:
            Session(backend, pids).restore_all(device_map)
        assert "CUDA_ERROR_INVALID_VALUE (1)" in caught.value.cause
        assert "every GPU" in caught.value.hint
        assert states(fake, pids) == {"checkpointed"}


@pytest.mark.parametrize("uuid", ["0", "MIG-00000090-5ca1-ab1e-0000-000000000000", UUID + ",GPU-0=GPU-1"])
def test_a_device_map_of_nonsense(fake: FakeCuda, backend: Backend, pids: list[int], uuid: str) -> None:
    with pytest.raises(CudaError) as caught:
        backend.restore(pids[0], {UUID: uuid})
    assert "invalid UUID of a whole GPU" in caught.value.cause
    assert "restore" not in {each.step for each in fake.log()}


def test_a_state_that_was_lost_is_not_restored(fake: FakeCuda, backend: Backend, pids: list[int]) -> None:
    Session(backend, pids).checkpoint_all(20)
    Path(f"/dev/shm/fake-cuda-{pids[2]}").unlink()
    with pytest.raises(CudaError, match=f"process {pids[2]}"):
        Session(backend, pids).restore_all({}, roll_back=False)
    assert "restore" not in {each.step for each in fake.log()}


def test_a_restore_of_processes_that_end_if_it_fails_goes_back_nowhere(
    fake: FakeCuda, backend: Backend, pids: list[int]
) -> None:
    Session(backend, pids).checkpoint_all(20)
    fake.forget()
    fake.describe(faults=[{"step": "unlock", "nth": 2, "code": 999}])
    with pytest.raises(CudaError, match="unlock"):
        Session(backend, pids).restore_all({}, roll_back=False)
    assert [each.step for each in fake.log() if each.step in {"lock", "checkpoint"}] == []
    assert states(fake, pids) == {"running", "locked"}


def test_two_backends_lead_to_the_same_states(fake: FakeCuda, home: Home, pids: list[int]) -> None:
    from rekindle.cuda.utility import Utility

    with contextlib.closing(search.find(home)) as driver:
        assert driver.name == "driver"
        driver.lock(pids[0], 5)
        utility = Utility.find(home)
        assert utility.state(pids[0]) is State.LOCKED
        utility.unlock(pids[0])
        assert driver.state(pids[0]) is State.RUNNING


def test_a_server_in_a_cell_holds_its_state_there(
    fake: FakeCuda, backend: Backend, port: int, tmp_path: Path
) -> None:
    command = Command(
        argv=workhorse(port, "cuda=100", "cuda-child"),
        env={**os.environ, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        files={0: Path(os.devnull), 1: tmp_path / "log", 2: tmp_path / "log"},
        workload=True,
    )
    (tmp_path / "log").touch()
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        inside = cell.spawn(command)
        wait_for(lambda: "serving" in (tmp_path / "log").read_text(), 20)
        wait_for(lambda: len(holders(backend, host_pids(cell))) == 2, 20)  # its child may come later
        pids = holders(backend, host_pids(cell))
        assert inside not in pids
        assert (cell.root / f"dev/shm/fake-cuda-{inside}").exists()
        assert not Path(f"/dev/shm/fake-cuda-{inside}").exists()
        thread = backend.restore_thread(pids[0])  # as it is called here
        assert Path(f"/proc/{pids[0]}/task/{thread}/comm").read_text().startswith("cuda")
        assert fake.held(pids[0])["device_bytes"] == 100 << 20
        with Session(backend, pids) as session:
            session.checkpoint_all(20)
            assert states(fake, pids) == {"checkpointed"}
            session.restore_all({})
        assert states(fake, pids) == {"running"}


def test_nothing_of_it_is_imported_where_it_is_not_needed() -> None:
    heavy = {"ctypes", "subprocess", "pynvml", "concurrent.futures", "asyncio", "tempfile"}
    assert not imported_by("rekindle.cuda") & heavy
    for name in ("cli.restore", "cli.doctor", "restore.decide.abilities", "rekindle.home"):
        assert not [each for each in imported_by(name) if each.startswith("rekindle.cuda")]


def imported_by(name: str) -> set[str]:
    """The modules that a fresh interpreter has after one import."""
    program = f"import sys, {name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())
