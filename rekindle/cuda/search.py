# SPDX-License-Identifier: Apache-2.0
"""Find the backend that checkpoints CUDA on this node: the driver's API, or the cuda-checkpoint utility."""

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from rekindle.errors import CapabilityError, UsageError
from rekindle.home import Home

if TYPE_CHECKING:
    from rekindle.cuda.backend import Backend
    from rekindle.cuda.driver import Driver
    from rekindle.record import Record


_NAMES = ("driver", "utility")
# $REKINDLE_CUDA_DOOR is the name that earlier versions documented.
_VARIABLES = ("REKINDLE_CUDA_BACKEND", "REKINDLE_CUDA_DOOR")
_HINT = "update the NVIDIA driver to 580 or newer; see `rekindle doctor`"


class BackendCandidate(NamedTuple):
    """A backend that was tried.

    `problem` says why it does not work; "" if it does. `chosen` marks the one that `find` returns.
    """

    name: str
    detail: str
    problem: str
    hint: str = ""
    chosen: bool = False


def find(home: Home) -> "Backend":
    """Return the driver's API, or else cuda-checkpoint, once the driver has started, which takes seconds.

    `$REKINDLE_CUDA_BACKEND` (`driver` or `utility`) forces one. The caller closes the backend. Raises
    UsageError for another value, and CapabilityError, with the reasons, if no backend works.
    """
    with Search(home) as search:
        return search.backend(start=True)


def candidates(home: Home) -> list[BackendCandidate]:
    """Try every backend now, each with a start of the driver."""
    with Search(home) as search:
        found: list[BackendCandidate] = []
        for candidate, backend in search.tried(start=True):
            first = backend is not None and not any(each.chosen for each in found)
            found.append(candidate._replace(chosen=first))
            if backend is not None:
                backend.close()
        return found


def problem(home: Home) -> str:
    """Return why no backend works; "" if one may work, as far as it shows without starting the driver."""
    found = []
    for name in _names():
        if name == "driver":
            from rekindle.cuda import driver

            found.append(f"driver: {reason}" if (reason := driver.problem()) else "")
        else:
            from rekindle.cuda.utility import Utility

            try:
                Utility.find(home)
                found.append("")
            except CapabilityError as error:
                found.append(f"utility: {error.message}")
        if not found[-1]:
            return ""
    return "; ".join(found)


def begin_search(record: "Record", home: Home) -> "contextlib.AbstractContextManager[Search | None]":
    """Begin a search for a record with CUDA state, so that the driver starts during other work.

    Returns a context manager: it gives None for a record without CUDA state, and stops the driver at the
    end unless `Search.backend` has returned it.
    """
    if not record.process.cuda_pids:
        return contextlib.nullcontext()
    return Search(home)


class Search:
    """`find` in two halves: the constructor starts the driver, and `backend` waits until it can be called."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._names = _names()
        self._driver: Driver | None = None
        if "driver" in self._names:
            from rekindle.cuda import driver

            self._driver = driver.Driver()

    def backend(self, *, start: bool = False) -> "Backend":
        """Return the backend as `find` does. The caller closes it.

        Without `start`, do not wait for the driver's start: calls that need it wait themselves, and raise
        CudaError if it fails.
        """
        tried = []
        for candidate, backend in self.tried(start=start):
            if backend is not None:
                return backend
            tried.append(candidate)
        raise CapabilityError(
            "cannot checkpoint and restore CUDA on this node",
            cause="; ".join(f"{candidate.name}: {candidate.problem}" for candidate in tried),
            hint=tried[0].hint,
        )

    def problem(self) -> str:
        """Return why no backend works; "" if one may. Does not wait for the driver's start."""
        problems = []
        if self._driver is not None:
            self._driver.wait_for_library()
            if not self._driver.problem:
                return ""
            problems.append(f"driver: {self._driver.problem}")
        if "utility" in self._names:
            candidate, _ = self._try_utility(driver_failed=self._was_started())
            if not candidate.problem:
                return ""
            problems.append(f"utility: {candidate.problem}")
        return "; ".join(problems)

    def tried(self, *, start: bool = False) -> "Iterator[tuple[BackendCandidate, Backend | None]]":
        """Yield each candidate, with its backend if it works; with `start`, try whether the driver starts."""
        driver_failed = False
        for name in self._names:
            if name == "driver":
                candidate, backend = self._try_driver(start=start)
                driver_failed = bool(candidate.problem) and self._was_started()
            else:
                candidate, backend = self._try_utility(driver_failed=driver_failed, start=start)
            yield candidate, backend

    def close(self) -> None:
        """Stop the driver's client unless `backend` has returned it. Idempotent."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _was_started(self) -> bool:
        return self._driver is not None and self._driver.started

    def _try_driver(self, *, start: bool) -> "tuple[BackendCandidate, Backend | None]":
        assert self._driver is not None
        driver = self._driver
        if start:
            driver.wait()
        else:
            driver.wait_for_library()
        if problem := driver.problem:
            return BackendCandidate(name="driver", detail="libcuda.so.1", problem=problem, hint=_HINT), None
        self._driver = None
        known = f"CUDA {driver.version // 1000}.{driver.version % 1000 // 10}"
        return BackendCandidate(name="driver", detail=f"libcuda.so.1, {known}", problem=""), driver

    def _try_utility(
        self, *, driver_failed: bool, start: bool = False
    ) -> "tuple[BackendCandidate, Backend | None]":
        from rekindle.cuda.utility import Utility

        try:
            utility = Utility.find(self._home)
        except CapabilityError as error:
            return BackendCandidate(name="utility", detail="", problem=error.message, hint=error.hint), None
        detail = f"{utility.path} {utility.version}"
        problem = "it starts the same driver, which failed" if driver_failed else ""
        if start and not problem:
            problem = utility.problem()
        if problem:
            return BackendCandidate(name="utility", detail=detail, problem=problem, hint=_HINT), None
        return BackendCandidate(name="utility", detail=detail, problem=""), utility


def _names() -> tuple[str, ...]:
    """Return the backends to try, in order. Raises UsageError for an unknown one."""
    variable, forced = next(
        ((name, value) for name in _VARIABLES if (value := os.environ.get(name))), ("", "")
    )
    if not forced:
        return _NAMES
    if forced not in _NAMES:
        raise UsageError(f"invalid {variable} {forced!r}", hint=f"set it to {' or '.join(_NAMES)}")
    return (forced,)
