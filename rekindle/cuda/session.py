# SPDX-License-Identifier: Apache-2.0
"""Checkpoint or restore all CUDA processes of a server, or leave each as it was found.

Every process is locked before any is checkpointed, and restored before any is unlocked, because they wait
for each other on their GPUs. A journal on disk records the state that each was found in, so that
`rekindle doctor --repair` can undo even what a killed command did.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rekindle import journal as journals
from rekindle.cuda.backend import (
    NOT_INITIALIZED,
    STEP_SECONDS,
    Action,
    Backend,
    State,
    failure,
    timed_out,
)
from rekindle.errors import CudaError, RekindleError
from rekindle.journal import FoundProcess, start_ticks

T = TypeVar("T")
ROLLBACK_STEP_SECONDS = 120.0

# The steps from a process's present state to the one it was found in. A rollback takes each step for every
# process that needs it before the next step.
_STEPS_BACK = (Action.RESTORE, Action.UNLOCK, Action.LOCK, Action.CHECKPOINT)
_WAYS_BACK = {
    (State.CHECKPOINTED, State.RUNNING): (Action.RESTORE, Action.UNLOCK),
    (State.CHECKPOINTED, State.LOCKED): (Action.RESTORE,),
    (State.LOCKED, State.RUNNING): (Action.UNLOCK,),
    (State.LOCKED, State.CHECKPOINTED): (Action.CHECKPOINT,),
    (State.RUNNING, State.LOCKED): (Action.LOCK,),
    (State.RUNNING, State.CHECKPOINTED): (Action.LOCK, Action.CHECKPOINT),
}


class Session:
    """A transaction over the CUDA processes of a server. Not thread-safe.

    As a context manager, it rolls back if it is left with an exception, and keeps the states otherwise.
    When a signal raises an exception, running calls finish first: the driver cannot be interrupted.
    """

    def __init__(
        self,
        backend: Backend,
        pids: Collection[int],
        journal: Path | None = None,
        *,
        rollback_step_seconds: float = ROLLBACK_STEP_SECONDS,
    ) -> None:
        """Prepare a session. `rollback_step_seconds` is the timeout of each step of a rollback."""
        self._backend = backend
        self._pids = tuple(dict.fromkeys(pids))
        self._journal = journal
        self._rollback_step_seconds = rollback_step_seconds
        self._found: tuple[FoundProcess, ...] = ()
        self._rolled_back = False

    def checkpoint_all(self, timeout_seconds: float, *, maybe_idle: Collection[int] = ()) -> list[int]:
        """Checkpoint every process, then check that each is `checkpointed`; return those that were left out.

        Left out are processes of `maybe_idle` in which CUDA says that it is not initialized: they have called
        cuInit and have no context, so there is nothing to checkpoint (NVIDIA/cuda-checkpoint#10).

        Raises CudaError after a rollback; if that fails for a process, the error's cause says so.
        """
        with self._all_or_nothing():
            deadline = _Deadline(timeout_seconds)
            states = self._read_states(deadline)
            running = [pid for pid, state in states.items() if state is State.RUNNING]
            failures = _collect_failures(
                running, lambda pid: self._backend.lock(pid, deadline.left(Action.LOCK, pid))
            )
            idle = [pid for pid, error in failures.items() if pid in maybe_idle and _has_no_context(error)]
            _raise_first([error for pid, error in failures.items() if pid not in idle])
            for pid in idle:
                del states[pid]
            self._pids = tuple(states)
            ready = [pid for pid, state in states.items() if state is not State.CHECKPOINTED]
            _do_all(
                ready,
                lambda pid: self._backend.checkpoint(
                    pid, timeout_seconds=deadline.left(Action.CHECKPOINT, pid)
                ),
            )
            for pid, state in self._query_states(deadline).items():
                if state is not State.CHECKPOINTED:
                    raise failure(Action.CHECKPOINT, pid, 0, "", f"it is still {state}")
        return idle

    def restore_all(
        self,
        device_map: Mapping[str, str],
        timeout_seconds: float = STEP_SECONDS,
        *,
        roll_back: bool = True,
    ) -> None:
        """Restore every process, then unlock every one, whatever their states; this ends the transaction.

        Raises CudaError, after a rollback as in `checkpoint_all`. Pass `roll_back=False` for processes that
        CRIU has restored: they will be killed after a failure, and one that is not checkpointed has lost its
        state, which is a failure.
        """
        with self._all_or_nothing() if roll_back else contextlib.nullcontext():
            deadline = _Deadline(timeout_seconds)
            states = self._read_states(deadline)
            lost = [pid for pid, state in states.items() if state is State.RUNNING and not roll_back]
            if lost:
                raise failure(Action.RESTORE, lost[0], 0, "", "its CUDA state is not in the dump")
            checkpointed = [pid for pid, state in states.items() if state is State.CHECKPOINTED]
            _do_all(
                checkpointed,
                lambda pid: self._backend.restore(
                    pid, device_map, timeout_seconds=deadline.left(Action.RESTORE, pid)
                ),
            )
            locked = [pid for pid, state in states.items() if state is not State.RUNNING]
            _do_all(
                locked,
                lambda pid: self._backend.unlock(pid, timeout_seconds=deadline.left(Action.UNLOCK, pid)),
            )
            self._commit()

    def rollback(self) -> list[str]:
        """Bring every process back to the state it was found in; return the failures, one line each.

        Ignores processes that have ended. A second call retries the failures. Raises only the exception of
        a signal, after the rollback.
        """
        failures, interruption = self._roll_back()
        if interruption is not None:
            raise interruption
        return failures

    def _roll_back(self) -> tuple[list[str], BaseException | None]:
        self._rolled_back = True
        if not self._found:
            return [], None
        rollback = _Rollback(self._backend, self._found, self._rollback_step_seconds)
        (bug,), interruption = _run_all([rollback.run])
        if bug is not None:
            return [f"the rollback failed: {bug!r}"], interruption
        self._found = tuple(entry for entry in self._found if entry.pid in rollback.failed)
        if not self._found:
            self._commit()
        elif self._journal:
            with contextlib.suppress(OSError):  # the old journal stays then; it lists more processes
                journals.write(self._journal, self._found)
        return _describe(rollback.failed), interruption

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._commit()
        elif not self._rolled_back:
            self._roll_back_after(error)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._roll_back_after(error)
            raise

    def _roll_back_after(self, error: BaseException) -> None:
        """Roll back, and add the failures of that to the error."""
        failures, _ = self._roll_back()
        if failures:
            advice = ["run `rekindle doctor --repair` to try again"] if self._journal else []
            text = "; ".join([*failures, *advice])
            if isinstance(error, RekindleError):
                error.cause = f"{error.cause}; {text}" if error.cause else text
            else:
                error.add_note(text)

    def _read_states(self, deadline: "_Deadline") -> dict[int, State]:
        """Return the state of every process; the first call also records them, here and in the journal."""
        starts = {pid: start_ticks(pid) for pid in self._pids}
        states = self._query_states(deadline)
        for pid, state in states.items():
            if state is State.FAILED:
                raise CudaError(
                    f"CUDA in process {pid} has failed",
                    cause="an earlier checkpoint or restore of it was interrupted",
                    hint="kill it and restart the server",
                )
        if not self._found:
            found = []
            for pid, start in starts.items():
                if start is None:
                    raise failure(Action.STATE, pid, 0, "", "it has ended")
                found.append(FoundProcess(pid=pid, start_ticks=start, state=states[pid]))
            self._found = tuple(found)
            self._rolled_back = False
            if self._journal:
                journals.write(self._journal, found)
        return states

    def _query_states(self, deadline: "_Deadline") -> dict[int, State]:
        return _ask_all(
            self._pids, lambda pid: self._backend.state(pid, timeout_seconds=deadline.left(Action.STATE, pid))
        )

    def _commit(self) -> None:
        """Keep the present states: there is nothing to roll back any more."""
        self._found = ()
        if self._journal:
            self._journal.unlink(missing_ok=True)


def holders(backend: Backend, pids: Collection[int]) -> list[int]:
    """Return the processes that hold CUDA. Raises CudaError."""
    threads = _ask_all(tuple(pids), backend.restore_thread)
    return [pid for pid, thread in threads.items() if thread is not None]


def repair(journal: Path, open_backend: Callable[[], Backend]) -> list[str]:
    """Roll back what a killed command did; return a line about each process.

    Ignores processes that have ended, and opens the backend only if there is anything to do. Afterwards the
    journal lists the processes that could not be rolled back, or is removed if there are none. Raises what
    `open_backend` raises.
    """
    found = journals.read(journal)
    if not found:
        journal.unlink(missing_ok=True)
        return []
    with contextlib.closing(open_backend()) as backend:
        rollback = _Rollback(backend, found, ROLLBACK_STEP_SECONDS)
        rollback.run()
    failed = [entry for entry in found if entry.pid in rollback.failed]
    if failed:
        journals.write(journal, failed)
    else:
        journal.unlink(missing_ok=True)
    return _describe(rollback.failed) + rollback.done


def _describe(failed: Mapping[int, str]) -> list[str]:
    return [f"process {pid} could not be rolled back: {reason}" for pid, reason in failed.items()]


class _Rollback:
    """Brings back as many processes as possible.

    `done` has a line about each of them; `failed` maps the PIDs of the others to the reasons.
    """

    def __init__(self, backend: Backend, found: Sequence[FoundProcess], seconds: float) -> None:
        self._backend = backend
        self._found = {entry.pid: entry for entry in reversed(found)}
        self._seconds = seconds
        self.done: list[str] = []
        self.failed: dict[int, str] = {}

    def run(self) -> None:
        states: dict[int, State] = {}

        def query(pid: int) -> None:
            states[pid] = self._backend.state(pid, timeout_seconds=self._seconds)

        self._try(query, list(self._found))
        ways: dict[int, tuple[Action, ...]] = {}
        for pid, state in states.items():
            wanted = State(self._found[pid].state)
            if state is State.FAILED:
                self.failed[pid] = "CUDA in it has failed; it can only be killed"
            elif state is wanted:
                self.done.append(f"process {pid} is {wanted} already")
            else:
                ways[pid] = _WAYS_BACK[state, wanted]
        for step in _STEPS_BACK:
            self._try(self._action(step), [pid for pid, way in ways.items() if step in way])
        self.done += [
            f"process {pid} was {states[pid]} and is {self._found[pid].state} again"
            for pid in ways
            if pid not in self.failed and self._found[pid].is_alive()
        ]

    def _try(self, action: Callable[[int], None], pids: Sequence[int]) -> None:
        """Act on the processes that live and have not failed before; record failures."""
        pending = [pid for pid in pids if pid not in self.failed and self._found[pid].is_alive()]
        for pid, error in _collect_failures(pending, action).items():
            if self._found[pid].is_alive():
                reason = error.cause or error.message if isinstance(error, RekindleError) else repr(error)
                self.failed[pid] = reason

    def _action(self, step: Action) -> Callable[[int], None]:
        seconds = self._seconds
        match step:
            case Action.RESTORE:
                return lambda pid: self._backend.restore(pid, {}, timeout_seconds=seconds)
            case Action.UNLOCK:
                return lambda pid: self._backend.unlock(pid, timeout_seconds=seconds)
            case Action.LOCK:
                return lambda pid: self._backend.lock(pid, seconds)
            case Action.CHECKPOINT:
                return lambda pid: self._backend.checkpoint(pid, timeout_seconds=seconds)
            case _:
                raise AssertionError(step)


class _Deadline:
    """A deadline shared by several steps."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, step: Action, pid: int) -> float:
        """Return the seconds that are left. Raises CudaError if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise timed_out(step, pid, self._seconds, "earlier steps took all of it")
        return left


def _do_all(pids: Sequence[int], action: Callable[[int], None]) -> None:
    """Act on all processes in parallel; raise the first failure, with the others in its cause."""
    _raise_first(list(_collect_failures(pids, action).values()))


def _has_no_context(error: Exception) -> bool:
    return isinstance(error, CudaError) and error.number == NOT_INITIALIZED


def _raise_first(failures: Sequence[Exception]) -> None:
    if failures:
        first, *others = failures
        if others and isinstance(first, RekindleError):
            first.cause = "; ".join([first.cause, *(str(error) for error in others)])
        raise first


def _ask_all(pids: Sequence[int], question: Callable[[int], T]) -> dict[int, T]:
    """Query all processes in parallel; return the answers in the order of the PIDs."""
    answers: dict[int, T] = {}

    def ask(pid: int) -> None:
        answers[pid] = question(pid)

    _do_all(pids, ask)
    return {pid: answers[pid] for pid in pids}


def _collect_failures(pids: Sequence[int], action: Callable[[int], None]) -> dict[int, Exception]:
    """Act on all processes in parallel; return the failures."""
    errors, interruption = _run_all([functools.partial(action, pid) for pid in pids])
    if interruption is not None:
        raise interruption
    return {pid: error for pid, error in zip(pids, errors, strict=True) if error is not None}


def _run_all(
    actions: Sequence[Callable[[], None]],
) -> tuple[list[Exception | None], BaseException | None]:
    """Run all actions, each in a thread, and wait for them; return the exception of each, or None.

    Also returns the exception that a signal raised meanwhile: the driver's calls cannot be interrupted, and
    must finish before anything is undone.
    """
    errors: list[Exception | None] = [None] * len(actions)
    over = [threading.Event() for _ in actions]
    begin = threading.Event()
    cancelled = True

    def act(number: int) -> None:
        begin.wait()
        if cancelled:
            return
        try:
            actions[number]()
        except Exception as error:
            errors[number] = error
        finally:
            over[number].set()

    interruption: BaseException | None = None
    try:
        for number in range(len(actions)):
            threading.Thread(target=act, args=[number], name="cuda", daemon=True).start()
        cancelled = False
    except BaseException as error:
        interruption = error
    begin.set()
    if cancelled:
        return errors, interruption
    for event in over:  # not join: CPython 3.11 takes a thread for finished once a signal interrupts its join
        while not event.is_set():
            try:
                event.wait()
            except BaseException as error:
                interruption = interruption or error
    return errors, interruption
