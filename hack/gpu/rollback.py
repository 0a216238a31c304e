# SPDX-License-Identifier: Apache-2.0
"""Failures of a CUDA checkpoint, provoked on a live server that must survive them.

    python -m hack.gpu.rollback PID HOME

locks a process and waits to be killed, like a snapshot that is killed between lock and checkpoint.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from rekindle.cuda import search
from rekindle.cuda.backend import Backend, State
from rekindle.cuda.session import Session, holders
from rekindle.errors import CudaError
from rekindle.home import Home

JOURNAL = "cuda.json"
_STEP_SECONDS = 60.0
_ROLLBACK_STEP_SECONDS = 30.0  # for a rollback: one that hangs must not use up the time of other steps
_LOCK_SECONDS = 2.0


class When(StrEnum):
    """Whether a call fails instead of reaching the driver, or after the driver has done it."""

    INSTEAD = "instead"
    AFTERWARDS = "afterwards"


@dataclass(slots=True)
class Watched:
    """A backend that times all calls. The first call of the step `fails_at` fails."""

    inner: Backend
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
            raise CudaError(f"provoked failure of {step}")
        began = time.monotonic()
        yield
        self.seconds[step] = max(self.seconds.get(step, 0.0), time.monotonic() - began)
        if fails:
            raise CudaError(f"provoked failure of {step}, after it was done")


class _DumpError(Exception):
    pass


def cycle(backend: Watched, pids: list[int], journal: Path) -> None:
    """Checkpoint the processes and restore them."""
    with Session(backend, pids, journal, rollback_step_seconds=_ROLLBACK_STEP_SECONDS) as session:
        session.checkpoint_all(_STEP_SECONDS)
        session.restore_all({}, _STEP_SECONDS)


def _dump_fails(backend: Watched, pids: list[int], journal: Path) -> None:
    with Session(backend, pids, journal, rollback_step_seconds=_ROLLBACK_STEP_SECONDS) as session:
        session.checkpoint_all(_STEP_SECONDS)
        raise _DumpError("provoked failure of the dump, with everything checkpointed")


def _time_out_locking(backend: Watched, pids: list[int], journal: Path) -> None:
    with Session(backend, pids, journal, rollback_step_seconds=_ROLLBACK_STEP_SECONDS) as session:
        session.checkpoint_all(_LOCK_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A failure. The server's GPU is busy for `busy_seconds`; the error must contain `expected`."""

    name: str
    fails_at: str = ""
    when: When = When.INSTEAD
    act: Callable[[Watched, list[int], Path], None] = cycle
    busy_seconds: float = 0.0
    expected: str = "provoked failure"


CASES = (
    Case(
        name="lock times out, since the GPU is busy", act=_time_out_locking, busy_seconds=6.0, expected="lock"
    ),
    Case(name="lock fails", fails_at="lock"),
    Case(name="lock fails after it was done", fails_at="lock", when=When.AFTERWARDS),
    Case(name="checkpoint fails", fails_at="checkpoint"),
    Case(name="checkpoint fails after it was done", fails_at="checkpoint", when=When.AFTERWARDS),
    Case(name="dump fails", act=_dump_fails),
    Case(name="restore fails", fails_at="restore"),
    Case(name="restore fails after it was done", fails_at="restore", when=When.AFTERWARDS),
    Case(name="unlock fails", fails_at="unlock"),
)


def provoke(case: Case, backend: Backend, pids: list[int], journal: Path) -> str:
    """Provoke the failure. Return the message of the error, or "" if there was none, which is wrong."""
    try:
        case.act(Watched(backend, case.fails_at, case.when), pids, journal)
    except CudaError as error:
        return error.summary
    except _DumpError as error:
        return str(error)
    return ""


class _Holding(Watched):
    """A backend that locks, says so, and never checkpoints."""

    def checkpoint(self, pid: int, *, timeout_seconds: float = _STEP_SECONDS) -> None:  # noqa: ARG002
        print("locked", flush=True)
        time.sleep(timeout_seconds)


def main() -> None:
    pid, home = int(sys.argv[1]), Home(Path(sys.argv[2]))
    backend = search.find(home)
    with home.work("snapshot") as work:
        cycle(_Holding(backend), holders(backend, [pid]), work / JOURNAL)


if __name__ == "__main__":
    main()
