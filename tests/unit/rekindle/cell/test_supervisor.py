# SPDX-License-Identifier: Apache-2.0
"""How the supervisor divides its time: it answers calls that are made up, on memory of this process."""

import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from rekindle.cell.memory import MADV_DONTNEED, Call, CallSource, GoneError
from rekindle.cell.supervisor import Supervisor

PAGE = mmap.PAGESIZE
MIB = 1 << 20


@dataclass
class MadeUpCall:
    """madvise(start, size, MADV_DONTNEED) of this process."""

    start: int
    size: int
    answers: list[int | str] = field(default_factory=list)
    is_gone: bool = False
    tid: int = field(default_factory=os.getpid)
    is_mremap: bool = False

    @property
    def arguments(self) -> list[int]:
        return [self.start, self.size, MADV_DONTNEED, 0, 0, 0]

    def check(self) -> None:
        if self.is_gone:
            raise GoneError

    def answer(self, error: int = 0) -> None:
        self.answers.append(error)

    def resume(self) -> None:
        self.answers.append("goes on")


@dataclass
class MadeUpSource:
    calls: deque[MadeUpCall] = field(default_factory=deque)

    def receive(self) -> Call:
        return cast(Call, self.calls.popleft())

    def is_readable(self) -> bool:
        return bool(self.calls)


@dataclass
class Mapped:
    """A memory file of 64 MiB that this process has mapped, and a supervisor."""

    start: int
    supervisor: Supervisor
    source: MadeUpSource

    def take_in(self, *calls: MadeUpCall) -> None:
        self.source.calls += calls
        while self.source.calls:
            self.supervisor.receive()

    def finish(self) -> None:
        while self.supervisor.busy:
            self.supervisor.step()


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[Mapped]:
    size = 64 * MIB
    (tmp_path / "1").write_bytes(b"x" * size)
    with open(tmp_path / "1", "rb") as file:
        memory = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    anchor = ctypes.c_char.from_buffer(memory)
    start, source = ctypes.addressof(anchor), MadeUpSource()
    yield Mapped(start, Supervisor(cast(CallSource, source), str(tmp_path), [(start, start + size)]), source)
    del anchor
    memory.close()


def test_a_large_call_delays_no_small_one(mapped: Mapped) -> None:
    large = MadeUpCall(mapped.start, 32 * MIB)
    small = [MadeUpCall(mapped.start + 40 * MIB + n * PAGE, PAGE) for n in range(8)]
    mapped.take_in(large)
    mapped.supervisor.step()
    mapped.take_in(*small)
    for _ in range(9):
        mapped.supervisor.step()
    assert [call.answers for call in small] == [[0]] * 8
    assert large.answers == []
    mapped.finish()
    assert large.answers == [0]
    assert ctypes.string_at(mapped.start, 32 * MIB) == bytes(32 * MIB)
    assert ctypes.string_at(mapped.start + 32 * MIB, 8 * MIB) == b"x" * 8 * MIB


def test_calls_elsewhere_need_no_turn(mapped: Mapped) -> None:
    elsewhere = MadeUpCall(mapped.start + 64 * MIB, PAGE)
    mapped.take_in(MadeUpCall(mapped.start, 8 * MIB), elsewhere)
    assert elsewhere.answers == ["goes on"]


def test_many_calls_need_few_descriptors(mapped: Mapped) -> None:
    before = len(os.listdir("/proc/self/fd"))
    calls = [MadeUpCall(mapped.start + n % 16 * 4 * MIB, 4 * MIB) for n in range(200)]
    mapped.take_in(*calls)
    most = 0
    while mapped.supervisor.busy:
        mapped.supervisor.step()
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert [call.answers for call in calls] == [[0]] * 200
    assert 16 < most < 100
    assert len(os.listdir("/proc/self/fd")) - before == 1  # the memory file


def test_a_call_whose_task_died_is_given_up(mapped: Mapped) -> None:
    before = len(os.listdir("/proc/self/fd"))
    call = MadeUpCall(mapped.start, 8 * MIB)
    mapped.take_in(call)
    mapped.supervisor.step()
    call.is_gone = True
    mapped.supervisor.step()
    assert not mapped.supervisor.busy
    assert call.answers == []
    assert len(os.listdir("/proc/self/fd")) - before == 1
    assert ctypes.string_at(mapped.start + 4 * MIB, 1) == b"x"


def test_a_task_that_cannot_be_looked_at_is_told_of_an_error(mapped: Mapped) -> None:
    call = MadeUpCall(mapped.start, PAGE, tid=1 << 22)
    mapped.take_in(call)
    mapped.finish()
    assert call.answers == [errno.EIO]
