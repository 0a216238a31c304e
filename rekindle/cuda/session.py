# SPDX-License-Identifier: Apache-2.0
"""All of a server's CUDA processes at once: every one is checkpointed, or every one is as it was found.

Every process is locked before any is checkpointed, and restored before any is unlocked: they wait for each
other on their GPUs. A journal on disk says how each was found, so that even a command that was killed can be
undone: `rekindle doctor --repair`.
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
from rekindle.cuda.door import STEP_SECONDS, Action, Door, State, failure, late
from rekindle.errors import CudaError, RekindleError
from rekindle.journal import Held, began

T = TypeVar("T")
PATIENCE_SECONDS = 120.0

# The steps from what a process is in to what it was found in. A rollback takes the first of them for every
# process that needs it, then the next.
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
    """A transaction over the CUDA processes of a server. Not for several threads.

    As a context manager, it rolls back if it is left with an exception, and otherwise leaves all as it is.
    What is going on when a signal's exception comes is finished first: the driver cannot be interrupted.
    """

    def __init__(
        self,
        door: Door,
        pids: Collection[int],
        journal: Path | None = None,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """`patience_seconds` is for each step of a rollback."""
        self._door = door
        self._pids = tuple(dict.fromkeys(pids))
        self._journal = journal
        self._patience_seconds = patience_seconds
        self._found: tuple[Held, ...] = ()
        self._rolled_back = False

    def checkpoint_all(self, timeout_seconds: float) -> None:
        """Checkpoints every process; after that, each is proved to be `checkpointed`.

        Raises CudaError, after a rollback; what that could not do is added to the error's cause.
        """
        with self._all_or_nothing():
            deadline = _Deadline(timeout_seconds)
            states = self._begin(deadline)
            running = [pid for pid, state in states.items() if state is State.RUNNING]
            _together(running, lambda pid: self._door.lock(pid, deadline.left(Action.LOCK, pid)))
            ready = [pid for pid, state in states.items() if state is not State.CHECKPOINTED]
            _together(
                ready,
                lambda pid: self._door.checkpoint(pid, timeout_seconds=deadline.left(Action.CHECKPOINT, pid)),
            )
            for pid, state in self._states(deadline).items():
                if state is not State.CHECKPOINTED:
                    raise failure(Action.CHECKPOINT, pid, 0, "", f"it is {state} all the same")

    def restore_all(
        self,
        device_map: Mapping[str, str],
        timeout_seconds: float = STEP_SECONDS,
        *,
        roll_back: bool = True,
    ) -> None:
        """Restores every process and then unlocks every one, whatever they were in; with that, all is done.

        Raises CudaError, after a rollback as of `checkpoint_all`; without one, for processes that are ended
        then, if `roll_back` is false.
        """
        with self._all_or_nothing() if roll_back else contextlib.nullcontext():
            deadline = _Deadline(timeout_seconds)
            states = self._begin(deadline)
            checkpointed = [pid for pid, state in states.items() if state is State.CHECKPOINTED]
            _together(
                checkpointed,
                lambda pid: self._door.restore(
                    pid, device_map, timeout_seconds=deadline.left(Action.RESTORE, pid)
                ),
            )
            locked = [pid for pid, state in states.items() if state is not State.RUNNING]
            _together(
                locked,
                lambda pid: self._door.unlock(pid, timeout_seconds=deadline.left(Action.UNLOCK, pid)),
            )
            self._settle()

    def rollback(self) -> list[str]:
        """Brings every process back to what it was found in; returns what could not be done.

        What has ended needs nothing. A second call does what is left. Nothing is raised but what a signal
        raises, and that when all is done.
        """
        left, interruption = self._roll_back()
        if interruption is not None:
            raise interruption
        return left

    def _roll_back(self) -> tuple[list[str], BaseException | None]:
        self._rolled_back = True
        if not self._found:
            return [], None
        back = _Rollback(self._door, self._found, self._patience_seconds)
        (bug,), interruption = _finish([back.run])
        if bug is not None:
            return [f"the rollback failed: {bug!r}"], interruption
        self._found = tuple(held for held in self._found if held.pid in back.left)
        if not self._found:
            self._settle()
        elif self._journal:
            with contextlib.suppress(OSError):  # then the old one stays, which tells of more
                journals.write(self._journal, self._found)
        return _in_words(back.left), interruption

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._settle()
        elif not self._rolled_back:
            self._undo(error)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._undo(error)
            raise

    def _undo(self, error: BaseException) -> None:
        left, _ = self._roll_back()
        if left:
            advice = ["`rekindle doctor --repair` tries it again"] if self._journal else []
            words = "; ".join([*left, *advice])
            if isinstance(error, RekindleError):
                error.cause = f"{error.cause}; {words}" if error.cause else words
            else:
                error.add_note(words)

    def _begin(self, deadline: "_Deadline") -> dict[int, State]:
        """What every process is in. The first time, that is noted, here and in the journal."""
        starts = {pid: began(pid) for pid in self._pids}
        states = self._states(deadline)
        for pid, state in states.items():
            if state is State.FAILED:
                raise CudaError(
                    f"CUDA in process {pid} has failed",
                    cause="an earlier checkpoint or restore of it broke off",
                    hint="end it, and start the server anew",
                )
        if not self._found:
            found = []
            for pid, start in starts.items():
                if start is None:
                    raise failure(Action.STATE, pid, 0, "", "it has ended")
                found.append(Held(pid=pid, began=start, state=states[pid]))
            self._found = tuple(found)
            self._rolled_back = False
            if self._journal:
                journals.write(self._journal, found)
        return states

    def _states(self, deadline: "_Deadline") -> dict[int, State]:
        return _ask(
            self._pids, lambda pid: self._door.state(pid, timeout_seconds=deadline.left(Action.STATE, pid))
        )

    def _settle(self) -> None:
        """From here on, what is, is meant to be."""
        self._found = ()
        if self._journal:
            self._journal.unlink(missing_ok=True)


def holders(door: Door, pids: Collection[int]) -> list[int]:
    """Those of the processes that hold CUDA, asked at once. Raises CudaError."""
    threads = _ask(tuple(pids), door.restore_thread)
    return [pid for pid, thread in threads.items() if thread is not None]


def repair(journal: Path, open_door: Callable[[], Door]) -> list[str]:
    """Rolls back what a killed command left, and tells what was done, a line for each process.

    What has ended since is passed over, and the door is opened only if there is anything to do. The journal
    is gone afterwards, or tells of what could not be done. Raises what `open_door` raises.
    """
    found = journals.read(journal)
    if not found:
        journal.unlink(missing_ok=True)
        return []
    with contextlib.closing(open_door()) as door:
        back = _Rollback(door, found, PATIENCE_SECONDS)
        back.run()
    left = [held for held in found if held.pid in back.left]
    if left:
        journals.write(journal, left)
    else:
        journal.unlink(missing_ok=True)
    return _in_words(back.left) + back.done


def _in_words(left: Mapping[int, str]) -> list[str]:
    return [f"process {pid} could not be rolled back: {why}" for pid, why in left.items()]


class _Rollback:
    """Brings processes back, as many as can be. `done` tells of those, `left` why others are not."""

    def __init__(self, door: Door, found: Sequence[Held], seconds: float) -> None:
        self._door = door
        self._found = {held.pid: held for held in reversed(found)}
        self._seconds = seconds
        self.done: list[str] = []
        self.left: dict[int, str] = {}

    def run(self) -> None:
        states: dict[int, State] = {}

        def look(pid: int) -> None:
            states[pid] = self._door.state(pid, timeout_seconds=self._seconds)

        self._try(look, list(self._found))
        ways: dict[int, tuple[Action, ...]] = {}
        for pid, state in states.items():
            wanted = State(self._found[pid].state)
            if state is State.FAILED:
                self.left[pid] = "CUDA in it has failed; it can only be ended"
            elif state is wanted:
                self.done.append(f"process {pid} is {wanted} already")
            else:
                ways[pid] = _WAYS_BACK[state, wanted]
        for step in _STEPS_BACK:
            self._try(self._action(step), [pid for pid, way in ways.items() if step in way])
        self.done += [
            f"process {pid} was {states[pid]}, and is {self._found[pid].state} again"
            for pid in ways
            if pid not in self.left and self._found[pid].lives()
        ]

    def _try(self, action: Callable[[int], None], pids: Sequence[int]) -> None:
        """For those that live and have not failed before; failures are noted."""
        able = [pid for pid in pids if pid not in self.left and self._found[pid].lives()]
        for pid, error in _failures(able, action).items():
            if self._found[pid].lives():
                words = error.cause or error.message if isinstance(error, RekindleError) else repr(error)
                self.left[pid] = words

    def _action(self, step: Action) -> Callable[[int], None]:
        seconds = self._seconds
        match step:
            case Action.RESTORE:
                return lambda pid: self._door.restore(pid, {}, timeout_seconds=seconds)
            case Action.UNLOCK:
                return lambda pid: self._door.unlock(pid, timeout_seconds=seconds)
            case Action.LOCK:
                return lambda pid: self._door.lock(pid, seconds)
            case Action.CHECKPOINT:
                return lambda pid: self._door.checkpoint(pid, timeout_seconds=seconds)
            case _:
                raise AssertionError(step)


class _Deadline:
    """Of several steps together."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, step: Action, pid: int) -> float:
        """The seconds that are left. Raises CudaError if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise late(step, pid, self._seconds, "what came before took all of that")
        return left


def _together(pids: Sequence[int], action: Callable[[int], None]) -> None:
    """Does something for every process at once; raises the first failure, with the others in its cause."""
    failures = _failures(pids, action)
    if failures:
        first, *others = failures.values()
        if others and isinstance(first, RekindleError):
            first.cause = "; ".join([first.cause, *(str(error) for error in others)])
        raise first


def _ask(pids: Sequence[int], question: Callable[[int], T]) -> dict[int, T]:
    """The answer for every process, in their order."""
    answers: dict[int, T] = {}

    def ask(pid: int) -> None:
        answers[pid] = question(pid)

    _together(pids, ask)
    return {pid: answers[pid] for pid in pids}


def _failures(pids: Sequence[int], action: Callable[[int], None]) -> dict[int, Exception]:
    """Does something for every process at once, and returns what failed."""
    errors, interruption = _finish([functools.partial(action, pid) for pid in pids])
    if interruption is not None:
        raise interruption
    return {pid: error for pid, error in zip(pids, errors, strict=True) if error is not None}


def _finish(
    actions: Sequence[Callable[[], None]],
) -> tuple[list[Exception | None], BaseException | None]:
    """Does everything at once, each in a thread, and waits for all; returns what each raised.

    And the exception that a signal raised here meanwhile. It is held back until all have come to their end:
    what the driver has begun cannot be taken back, and must be over before anything is undone.
    """
    errors: list[Exception | None] = [None] * len(actions)
    over = [threading.Event() for _ in actions]
    begin = threading.Event()
    called_off = True

    def act(number: int) -> None:
        begin.wait()
        if called_off:
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
        called_off = False
    except BaseException as error:
        interruption = error
    begin.set()
    if called_off:
        return errors, interruption
    for event in over:  # CPython 3.11 takes a thread for ended once a signal has interrupted a join of it
        while not event.is_set():
            try:
                event.wait()
            except BaseException as error:
                interruption = interruption or error
    return errors, interruption
