# SPDX-License-Identifier: Apache-2.0
"""Which backend checkpoints CUDA here: the driver's API, or the cuda-checkpoint utility."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rekindle.errors import CapabilityError, UsageError
from rekindle.home import Home

if TYPE_CHECKING:
    from rekindle.cuda.door import Door
    from rekindle.cuda.driver import Driver
    from rekindle.record import Record


def cuda_door(home: Home) -> "Callable[[], Door]":
    """What finds the door to CUDA's checkpoints, when it is called."""

    return lambda: find(home)


def starting_cuda(record: "Record", home: Home) -> "contextlib.AbstractContextManager[Search | None]":
    """The driver, which takes seconds to start, for a record with CUDA state; given up at the end if nobody
    took the door."""
    if not record.process.cuda_pids:
        return contextlib.nullcontext()
    return Search(home)


_NAMES = ("driver", "utility")
_HINT = "update the NVIDIA driver to 580 or newer; `rekindle doctor` tells more"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCandidate:
    """A door that was tried. `lack` says why it does not open; empty: it does. `chosen` is the one for us."""

    name: str
    detail: str
    lack: str
    hint: str = ""
    chosen: bool = False


def find(home: Home) -> "Door":
    """The driver's API, or else cuda-checkpoint; tried, which takes as long as the driver takes to start.

    `$REKINDLE_CUDA_DOOR` (`driver` or `utility`) leaves no choice. Raises CapabilityError, with the reason
    for each, if there is none. Close the door at the end.
    """
    with Search(home) as search:
        return search.door()


def candidates(home: Home) -> list[BackendCandidate]:
    """Every door, each tried now."""
    with Search(home) as search:
        found: list[BackendCandidate] = []
        for candidate, door in search.tried():
            first = door is not None and not any(each.chosen for each in found)
            found.append(replace(candidate, chosen=first))
            if door is not None:
                door.close()
        return found


def lack(home: Home) -> str:
    """Why there is no door, as far as it shows without starting the driver; empty if nothing does."""
    found = []
    for name in _names():
        if name == "driver":
            from rekindle.cuda import driver

            found.append(f"driver: {why}" if (why := driver.look()) else "")
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


class Search:
    """What `find` does, in two halves: the driver starts now, and `door` waits for it, after other work."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._names = _names()
        self._driver: Driver | None = None
        if "driver" in self._names:
            from rekindle.cuda import driver

            self._driver = driver.Driver()

    def door(self) -> "Door":
        """As `find`. The door is the caller's to close."""
        tried = []
        for candidate, door in self.tried():
            if door is not None:
                return door
            tried.append(candidate)
        raise CapabilityError(
            "there is no way to checkpoint and restore CUDA here",
            cause="; ".join(f"{candidate.name}: {candidate.lack}" for candidate in tried),
            hint=tried[0].hint,
        )

    def lack(self) -> str:
        """Why there is no door, as far as that can be told before the driver has started; empty if there may
        be one. Takes no seconds."""
        lacks = []
        if self._driver is not None:
            self._driver.look()
            if not self._driver.lack:
                return ""
            lacks.append(f"driver: {self._driver.lack}")
        if "utility" in self._names:
            candidate, _ = self._try_utility(in_vain=self._was_started())
            if not candidate.lack:
                return ""
            lacks.append(f"utility: {candidate.lack}")
        return "; ".join(lacks)

    def tried(self) -> "Iterator[tuple[BackendCandidate, Door | None]]":
        """Each candidate, and the door if it opens."""
        in_vain = False
        for name in self._names:
            if name == "driver":
                candidate, door = self._try_driver()
                in_vain = bool(candidate.lack) and self._was_started()
            else:
                candidate, door = self._try_utility(in_vain=in_vain)
            yield candidate, door

    def close(self) -> None:
        """Gives up what was started and not handed out. Idempotent."""
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

    def _try_driver(self) -> "tuple[BackendCandidate, Door | None]":
        assert self._driver is not None
        driver = self._driver
        driver.wait()
        if driver.lack:
            return BackendCandidate(name="driver", detail="libcuda.so.1", lack=driver.lack, hint=_HINT), None
        self._driver = None
        known = f"CUDA {driver.version // 1000}.{driver.version % 1000 // 10}"
        return BackendCandidate(name="driver", detail=f"libcuda.so.1, {known}", lack=""), driver

    def _try_utility(self, *, in_vain: bool) -> "tuple[BackendCandidate, Door | None]":
        from rekindle.cuda.utility import Utility

        try:
            utility = Utility.find(self._home)
        except CapabilityError as error:
            return BackendCandidate(name="utility", detail="", lack=error.message, hint=error.hint), None
        detail = f"{utility.path} {utility.version}"
        if in_vain:
            lack = "it starts the same driver"
            return BackendCandidate(name="utility", detail=detail, lack=lack, hint=_HINT), None
        return BackendCandidate(name="utility", detail=detail, lack=""), utility


def _names() -> tuple[str, ...]:
    """The doors to try, in this order."""
    asked = os.environ.get("REKINDLE_CUDA_DOOR")
    if not asked:
        return _NAMES
    if asked not in _NAMES:
        raise UsageError(f"REKINDLE_CUDA_DOOR is {asked!r}", hint=f"it may be {' or '.join(_NAMES)}")
    return (asked,)
