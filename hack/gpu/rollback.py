# SPDX-License-Identifier: Apache-2.0
"""A door to CUDA's checkpoints that fails where it is told, and measures what it does not fail at; and what
must be true after each failure. For hack/gpu-acceptance.

    python -m hack.gpu.rollback PID HOME    locks a process and waits for its own end, as a snapshot does
                                            that is killed between lock and checkpoint
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from rekindle.cuda import search
from rekindle.cuda.door import Door, State
from rekindle.cuda.session import Session, holders
from rekindle.errors import CudaError
from rekindle.home import Home

JOURNAL = "cuda.json"
_STEP_SECONDS = 60.0
_PATIENCE_SECONDS = 30.0  # of a rollback: what hangs must not take the time of other steps
_LOCK_SECONDS = 2.0


class When(StrEnum):
    """Whether the driver is asked before the call is said to have failed."""

    INSTEAD = "instead"
    AFTERWARDS = "afterwards"


@dataclass(slots=True)
class Watched:
    """A door as it is, but that the first call of one step fails, and that all calls are timed."""

    inner: Door
    fails_at: str = ""
    when: When = When.INSTEAD
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.inner.name

    def state(self, pid: int, *, timeout_seconds: float = _STEP_SECONDS) -> State:
        return self.inner.state(pid, timeout_seconds=timeout_seconds)

    def restore_thread(self, pid: int, *, timeout_seconds: float = _STEP_SECONDS) -> int | None:
        return self.inner.restore_thread(pid, timeout_seconds=timeout_seconds)

    def lock(self, pid: int, timeout_seconds: float) -> None:
        with self._watching("lock"):
            self.inner.lock(pid, timeout_seconds)

    def checkpoint(self, pid: int, *, timeout_seconds: float = _STEP_SECONDS) -> None:
        with self._watching("checkpoint"):
            self.inner.checkpoint(pid, timeout_seconds=timeout_seconds)

    def restore(
        self, pid: int, device_map: Mapping[str, str], *, timeout_seconds: float = _STEP_SECONDS
    ) -> None:
        with self._watching("restore"):
            self.inner.restore(pid, device_map, timeout_seconds=timeout_seconds)

    def unlock(self, pid: int, *, timeout_seconds: float = _STEP_SECONDS) -> None:
        with self._watching("unlock"):
            self.inner.unlock(pid, timeout_seconds=timeout_seconds)

    def close(self) -> None:
        self.inner.close()

    @contextlib.contextmanager
    def _watching(self, step: str) -> Iterator[None]:
        fails, self.fails_at = self.fails_at == step, "" if self.fails_at == step else self.fails_at
        if fails and self.when is When.INSTEAD:
            raise CudaError(f"{step} was made to fail")
        began = time.monotonic()
        yield
        self.seconds[step] = max(self.seconds.get(step, 0.0), time.monotonic() - began)
        if fails:
            raise CudaError(f"{step} was made to fail after it was done")


class _DumpError(Exception):
    pass


def cycle(door: Watched, pids: list[int], journal: Path) -> None:
    """There and back."""
    with Session(door, pids, journal, patience_seconds=_PATIENCE_SECONDS) as session:
        session.checkpoint_all(_STEP_SECONDS)
        session.restore_all({}, _STEP_SECONDS)


def _dump_fails(door: Watched, pids: list[int], journal: Path) -> None:
    with Session(door, pids, journal, patience_seconds=_PATIENCE_SECONDS) as session:
        session.checkpoint_all(_STEP_SECONDS)
        raise _DumpError("the dump was made to fail, with everything checkpointed")


def _lock_in_vain(door: Watched, pids: list[int], journal: Path) -> None:
    with Session(door, pids, journal, patience_seconds=_PATIENCE_SECONDS) as session:
        session.checkpoint_all(_LOCK_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A failure. `busy_seconds`: for so long the server's GPU has something to do; `told` is in the error."""

    name: str
    fails_at: str = ""
    when: When = When.INSTEAD
    act: Callable[[Watched, list[int], Path], None] = cycle
    busy_seconds: float = 0.0
    told: str = "made to fail"


CASES = (
    Case(name="the lock times out, since the GPU is busy", act=_lock_in_vain, busy_seconds=6.0, told="lock"),
    Case(name="the lock fails", fails_at="lock"),
    Case(name="the lock is done, and said to have failed", fails_at="lock", when=When.AFTERWARDS),
    Case(name="the checkpoint fails", fails_at="checkpoint"),
    Case(name="the checkpoint is done, and said to have failed", fails_at="checkpoint", when=When.AFTERWARDS),
    Case(name="the dump fails", act=_dump_fails),
    Case(name="the restore fails", fails_at="restore"),
    Case(name="the restore is done, and said to have failed", fails_at="restore", when=When.AFTERWARDS),
    Case(name="the unlock fails", fails_at="unlock"),
)


def fail(case: Case, door: Door, pids: list[int], journal: Path) -> str:
    """Does it; returns how it was told. Empty if nothing failed, which is wrong."""
    try:
        case.act(Watched(door, case.fails_at, case.when), pids, journal)
    except CudaError as error:
        return f"{error.message}: {error.cause}" if error.cause else error.message
    except _DumpError as error:
        return str(error)
    return ""


class _Holding(Watched):
    """Locks, says so, and goes no further."""

    def checkpoint(self, pid: int, *, timeout_seconds: float = _STEP_SECONDS) -> None:  # noqa: ARG002
        print("locked", flush=True)
        time.sleep(timeout_seconds)


def main() -> None:
    pid, home = int(sys.argv[1]), Home(Path(sys.argv[2]))
    door = search.find(home)
    with home.work("snapshot") as work:
        cycle(_Holding(door), holders(door, [pid]), work / JOURNAL)


if __name__ == "__main__":
    main()
