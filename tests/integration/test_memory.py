# SPDX-License-Identifier: Apache-2.0
"""Memory that is mapped from a file behaves as the anonymous memory that it was.

Two processes are told to do the same: one has ordinary anonymous memory, one has the same bytes mapped from a
memory file, as a restored process has. What each call returns, and what the memory is then, must be the same.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.cell import init as cell_init
from rekindle.cell import processes
from rekindle.cell.memory import FILTER
from tests.samples.mapped_memory import (
    AREAS,
    DONTNEED,
    DONTNEED_LOCKED,
    DONTUNMAP,
    FIXED,
    FREE,
    GUARD_INSTALL,
    GUARD_REMOVE,
    MAYMOVE,
    REMOVE,
    WIPEONFORK,
    Actor,
    actor,
    write_memory_file,
)
from tests.servers.memory_actor import PAGE

pytestmark = pytest.mark.criu


GAP = 80


FREE_PLACE = 200  # of the arena, where nothing is at first


FAR = 1 << 26  # pages from its start: 256 GiB


@dataclass
class Pair:
    """Two processes that do the same and must not differ."""

    anonymous: Actor
    mapped: Actor

    def start(self) -> None:
        """Give both the memory that all begins with."""
        self.anonymous.do("fill", str(self.anonymous.path), AREAS)
        self.mapped.do("set", str(self.mapped.path), AREAS)
        self.compare()

    def compare(self) -> None:
        assert self.anonymous.do("look") == self.mapped.do("look")

    def do(self, *operation: Any) -> Any:
        """Do the same in both; return the answer."""
        expected = self.anonymous.do(*operation)
        assert self.mapped.do(*operation) == expected
        self.compare()
        return expected

    def grow(self, page: int, old: int, new: int, target: int) -> Any:
        """Grow memory into another place; what is mapped is copied instead, as realloc does then."""
        expected = self.anonymous.do("remap", page, old, new, MAYMOVE | FIXED, target)
        answer = self.mapped.do("remap", page, old, new, MAYMOVE | FIXED, target)
        if expected == [target, 0] and answer in ([-1, errno.ENOMEM], [-1, errno.EFAULT]):
            answer = self.mapped.do("copy", page, old, new, target)
        assert answer == expected
        self.compare()
        return expected


# What an older kernel does not know, and what it is replaced by here.
OLDER = [
    ("address_space.py", "can_query = True", "can_query = False"),  # PROCMAP_QUERY, Linux 6.11
    ("memory.py", "_SYNC_WAKE_UP = 1", "_SYNC_WAKE_UP = 1 << 20"),  # Linux 6.6
    ("memory.py", "_FLAG_WAIT_KILLABLE_RECV = 0x20", "_FLAG_WAIT_KILLABLE_RECV = 1 << 30"),  # Linux 5.19
]


def write_older_init(place: Path) -> Path:
    """Write an init that does without what older kernels do not know, and return its path."""
    room = place / "rekindle" / "cell"
    shutil.copytree(Path(cell_init.__file__).parent, room)
    for name, now, then in OLDER:
        text = (room / name).read_text()
        assert text.count(now) == 1
        (room / name).write_text(text.replace(now, then))
    return room / "init.py"


@pytest.fixture(scope="module", params=["this kernel", "Linux 5.6"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place = tmp_path_factory.mktemp("memory")
    directory = place / "files"
    write_memory_file(directory)
    with contextlib.ExitStack() as stack:
        if request.param != "this kernel":
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(cell_init, "__file__", str(write_older_init(place)))
        anonymous = stack.enter_context(actor(directory, place / "anonymous.log", supervised=False))
        mapped = stack.enter_context(actor(directory, place / "mapped.log", supervised=True))
        yield Pair(anonymous, mapped)


@pytest.fixture
def pair(both: Pair) -> Pair:
    both.start()
    return both


@pytest.mark.parametrize("advice", [DONTNEED, DONTNEED_LOCKED])
@pytest.mark.parametrize(
    ("page", "count"),
    [(0, 1), (5, 1), (0, 64), (30, 4), (60, 8), (64, 16), (66, 2), (0, 80), (96, 32), (127, 1), (3, 0.5)],
)
def test_dropped_pages_are_zeros(pair: Pair, page: int, count: float, advice: int) -> None:
    pair.do("write", 10, "mine", 3)
    pair.do("write", 67, "mine", 3)
    assert pair.do("advise", page, count, advice) == [0, 0]
    pair.do("store", page, "again")
    pair.do("advise", page, count, advice)


@pytest.mark.parametrize("advice", [DONTNEED, FREE, DONTNEED_LOCKED])
@pytest.mark.parametrize(
    ("page", "count", "answer"),
    [
        (0.5, 1, [-1, errno.EINVAL]),
        (0, 0, [0, 0]),
        (0, (1 << 52) - 1, [-1, errno.EINVAL]),
        (0, (1 << 52) - 0.5, [-1, errno.EINVAL]),
        (60, 40, [-1, errno.ENOMEM]),
        (GAP, 4, [-1, errno.ENOMEM]),
        (GAP - 2, 4, [-1, errno.ENOMEM]),
        (GAP + 4, 20, [-1, errno.ENOMEM]),
        (120, 20, [-1, errno.ENOMEM]),
    ],
)
def test_errors_are_the_kernels(
    pair: Pair, page: float, count: float, advice: int, answer: list[int]
) -> None:
    if advice == FREE and answer == [-1, errno.ENOMEM]:
        pair.anonymous.do("advise", page, count, FREE)
        assert pair.mapped.do("advise", page, count, FREE) == answer
    else:
        assert pair.do("advise", page, count, advice) == answer


def test_locked_pages_are_dropped_only_when_that_is_asked_for(pair: Pair) -> None:
    pair.do("lock", 8, 4)
    assert pair.do("advise", 8, 1, DONTNEED) == [-1, errno.EINVAL]
    assert pair.do("advise", 4, 8, DONTNEED) == [-1, errno.EINVAL]  # the first four are dropped
    assert pair.do("advise", 8, 2, DONTNEED_LOCKED) == [0, 0]
    assert pair.do("advise", 8, 2, FREE) == [-1, errno.EINVAL]
    assert pair.do("unlock", 8, 4) == [0, 0]
    assert pair.do("advise", 8, 4, DONTNEED) == [0, 0]


@pytest.mark.parametrize("protection", [0, 1, 2, 3, 4, 5])
def test_protected_pages_are_dropped(pair: Pair, protection: int) -> None:
    pair.do("write", 4, "mine", 2)
    pair.do("protect", 2, 6, protection)
    assert pair.do("advise", 1, 8, DONTNEED) == [0, 0]
    pair.do("protect", 0, 16, 3)
    pair.do("store", 3, "again")


def test_what_lies_between_is_dropped_as_its_kind_is(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other file\n" * 1000)  # three pages, the last in part
    pair.do("map", 4, 2)
    pair.do("write", 4, "anonymous", 2)
    pair.do("map_file", str(other), 10, 3)
    pair.do("write", 10, "mine", 2)
    pair.do("write", 12, "in its last page")
    pair.do("share", 16, 2)
    pair.do("write", 16, "shared", 2)
    pair.do("unmap", 20, 1)
    pair.do("protect", 22, 1, 1)
    assert pair.do("advise", 0, 19, DONTNEED) == [0, 0]
    assert pair.do("advise", 0, 40, DONTNEED) == [-1, errno.ENOMEM]


def test_what_is_no_memory_ends_the_call(pair: Pair) -> None:
    operations = [["advise_with_vvar", 10, 8, 16, DONTNEED], ["look"]]
    status, (answer, _) = pair.do("child", operations)
    assert status == 0
    assert answer == [-1, errno.EINVAL]


def test_memory_is_given_back_where_the_file_has_a_hole(pair: Pair) -> None:
    pair.do("write", 66, "mine", 8)
    assert pair.mapped.do("own", 66, 8) == 8
    assert pair.do("advise", 64, 16, DONTNEED) == [0, 0]
    assert pair.mapped.do("own", 66, 8) == 0


def test_free_may_keep_pages_and_ends_where_it_cannot(pair: Pair, tmp_path: Path) -> None:
    before = pair.mapped.do("look")
    for page, count in ((0, 16), (64, 16), (0, 80)):
        assert pair.mapped.do("advise", page, count, FREE) == [0, 0]
        assert pair.anonymous.do("advise", page, count, FREE) == [0, 0]
    assert pair.mapped.do("look") == before
    pair.start()
    (tmp_path / "other").write_bytes(b"x" * PAGE)
    pair.do("map_file", str(tmp_path / "other"), 10, 1)
    assert pair.mapped.do("advise", 8, 4, FREE) == [-1, errno.EINVAL]
    assert pair.anonymous.do("advise", 8, 4, FREE) == [-1, errno.EINVAL]


# By advice: what anonymous memory answers, and what mapped memory does. docs/memory.md has the reasons.
UNLIKE = {
    REMOVE: ([-1, errno.EINVAL], [-1, errno.EACCES]),
    WIPEONFORK: ([0, 0], [-1, errno.EINVAL]),
}


POISON = {100, 101}


@pytest.mark.parametrize("advice", sorted({*range(26), 100, 101, GUARD_REMOVE, 999} - POISON - {FREE}))
def test_any_other_advice_leaves_the_bytes_as_they_are(pair: Pair, advice: int) -> None:
    pair.do("write", 3, "mine", 4)
    expected = pair.anonymous.do("advise", 0, 64, advice)
    answer = pair.mapped.do("advise", 0, 64, advice)
    assert (expected, answer) == UNLIKE.get(advice, (expected, expected))
    pair.compare()
    if advice != 10:  # MADV_DONTFORK: a child does not have the pages
        pair.do("child", [["look"]])


def test_guards_are_refused_as_they_are_on_files_of_older_kernels(pair: Pair) -> None:
    """A guard drops pages; once it was removed, the file's would be back. glibc uses mprotect then."""
    assert pair.mapped.do("advise", 4, 1, GUARD_INSTALL) == [-1, errno.EINVAL]
    assert pair.mapped.do("advise", 4, 1, GUARD_REMOVE) in ([0, 0], [-1, errno.EINVAL])
    pair.compare()
    pair.do("map", FREE_PLACE, 4)
    known = pair.anonymous.do("advise", FREE_PLACE, 1, GUARD_INSTALL)
    assert pair.mapped.do("advise", FREE_PLACE, 1, GUARD_INSTALL) == known


@pytest.mark.parametrize("advice", [DONTNEED, FREE, DONTNEED_LOCKED, GUARD_INSTALL])
def test_process_madvise_answers_as_a_kernel_that_has_it_for_others_only(pair: Pair, advice: int) -> None:
    assert pair.mapped.do("advise_other", 0, 4, advice) == [-1, errno.EINVAL]
    pair.compare()


def test_process_madvise_does_all_else(pair: Pair) -> None:
    cold = 20
    pair.do("advise_other", 0, 4, cold)


def test_memory_shrinks(pair: Pair) -> None:
    assert pair.do("remap", 32, 32, 8, 0) == [32, 0]
    assert pair.do("remap", 96, 32, 1.5, MAYMOVE) == [96, 0]
    assert pair.do("remap", 96, 1.5, 2, 0) == [96, 0]  # the same after rounding up


@pytest.mark.parametrize(
    ("page", "old", "new"), [(0, 64, 65), (96, 32, 64), (100, 4, 8), (127, 1, 2), (64, 1, 2)]
)
def test_growth_shows_neither_the_file_nor_its_end(pair: Pair, page: int, old: int, new: int) -> None:
    """realloc copies upon ENOMEM; what is then new is zeros in both."""
    assert pair.mapped.do("remap", page, old, new, MAYMOVE) == [-1, errno.ENOMEM]
    assert pair.mapped.do("remap", page, old, new, 0) == [-1, errno.ENOMEM]
    pair.compare()
    assert pair.grow(page, old, new, FREE_PLACE) == [FREE_PLACE, 0]
    pair.do("advise", FREE_PLACE, new, DONTNEED)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([0, 1, 2, MAYMOVE | FIXED, 0.5], errno.EINVAL),
        ([0, 4, 8, MAYMOVE | FIXED, 2], errno.EINVAL),
        ([0, 4, 8, FIXED, FREE_PLACE], errno.EINVAL),
        ([0, 0, 8, MAYMOVE], errno.EINVAL),
        ([0.5, 1, 2, MAYMOVE], errno.EINVAL),
        ([0, 1, 2, 8], errno.EINVAL),
        ([0, 1, 0, MAYMOVE], errno.EINVAL),
        ([0, 90, 100, MAYMOVE], errno.EFAULT),
        ([GAP, 4, 8, MAYMOVE], errno.EFAULT),
        ([GAP - 1, 2, 8, MAYMOVE], errno.EFAULT),
        ([GAP + 14, 4, 8, MAYMOVE], errno.EFAULT),
    ],
)
def test_growth_fails_as_it_does(pair: Pair, arguments: list[float], answer: int) -> None:
    assert pair.do("remap", *arguments) == [-1, answer]


def test_memory_that_was_moved_is_known_where_it_is(pair: Pair) -> None:
    assert pair.do("remap", 8, 8, 8, MAYMOVE | FIXED, FREE_PLACE) == [FREE_PLACE, 0]
    assert pair.do("remap", 96, 16, 4, MAYMOVE | FIXED, FREE_PLACE + 50) == [FREE_PLACE + 50, 0]
    assert pair.do("advise", FREE_PLACE + 2, 2, DONTNEED) == [0, 0]
    assert pair.do("advise", FREE_PLACE + 50, 4, DONTNEED) == [0, 0]
    assert pair.do("advise", 0, 32, DONTNEED) == [-1, errno.ENOMEM]
    assert pair.do("remap", FREE_PLACE, 8, 8, MAYMOVE | FIXED, 400) == [400, 0]
    assert pair.do("advise", 400, 2, DONTNEED) == [0, 0]
    assert pair.grow(400, 8, 16, FREE_PLACE) == [FREE_PLACE, 0]


def test_memory_that_was_moved_twice_is_known_where_it_is(pair: Pair) -> None:
    """The second move begins where no memory file was, so it is not seen."""
    for source, target in ((8, FAR), (FAR, FREE_PLACE)):
        assert pair.do("remap", source, 8, 8, MAYMOVE | FIXED, target) == [target, 0]
    assert pair.do("advise", FREE_PLACE + 2, 2, DONTNEED) == [0, 0]


def test_nothing_stays_mapped_where_memory_was_moved_from(pair: Pair) -> None:
    """MREMAP_DONTUNMAP would leave the file there. The answer is that of Linux before 5.7."""
    flags = MAYMOVE | FIXED | DONTUNMAP
    assert pair.mapped.do("remap", 0, 4, 4, flags, FREE_PLACE) == [-1, errno.EINVAL]
    pair.compare()
    pair.do("map", FREE_PLACE, 4)
    assert pair.do("remap", FREE_PLACE, 4, 4, flags, 400) == [400, 0]


def test_other_calls_need_no_help(pair: Pair) -> None:
    pair.do("protect", 4, 8, 1)
    pair.do("protect", 6, 2, 0)
    pair.do("lock", 0, 4)
    pair.do("unlock", 0, 64)
    pair.do("unmap", 10, 4)
    pair.do("map", 11, 2)
    pair.do("write", 11, "new", 2)
    pair.do("unmap", 0, 80)
    pair.do("map", 0, 80)
    pair.do("advise", 0, 80, DONTNEED)


def test_children_have_memory_of_their_own(pair: Pair) -> None:
    pair.do("write", 4, "mine", 8)
    grandchild = [["advise", 8, 2, DONTNEED], ["look"]]
    pair.do(
        "child",
        [
            ["advise", 4, 2, DONTNEED],
            ["store", 5, "child's"],
            ["look"],
            ["child", grandchild],
            ["look"],
            ["remap", 0, 4, 4, MAYMOVE | FIXED, FREE_PLACE],
            ["advise", FREE_PLACE, 2, DONTNEED],
            ["look"],
        ],
    )
    pair.do("advise", 0, 8, DONTNEED)


def test_programs_that_are_started_have_calls_of_their_own(pair: Pair) -> None:
    program = """
import mmap
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE)
memory.write(b"x" * len(memory))
memory.madvise(mmap.MADV_DONTNEED, 0, 4 * mmap.PAGESIZE)
memory.resize(2 << 20)
print(memory.rfind(b"x", 0), memory.find(b"x", 0), len(memory))
"""
    assert pair.do("run", program).split() == [str((1 << 20) - 1), str(4 * PAGE), str(2 << 20)]


def test_calls_of_a_thousand_threads_are_answered(pair: Pair) -> None:
    operations = [
        ["advise", 1, 1, DONTNEED],
        ["advise", 4, 8, DONTNEED],
        ["advise", 300, 1, DONTNEED],
        ["remap", 20, 1, 2, 0],
        ["advise", 66, 1, DONTNEED],
    ]
    answers = pair.mapped.do("threads", 1000, operations)
    expected = [[0, 0], [0, 0], [-1, errno.ENOMEM], [-1, errno.ENOMEM], [0, 0]]
    assert answers == expected * 200
    for operation in (operations[0], operations[1], operations[4]):
        pair.anonymous.do(*operation)
    pair.compare()


def test_calls_wait_for_an_init_that_is_slow(pair: Pair) -> None:
    init = pair.mapped.cell.init_pid
    operations = [["advise", page, 1, DONTNEED] for page in range(8)]
    os.kill(init, signal.SIGSTOP)
    try:
        pair.mapped.channel.sendall(json.dumps(["threads", 16, operations]).encode() + b"\n")
        pair.mapped.channel.settimeout(0.2)
        with pytest.raises(TimeoutError):
            pair.mapped.channel.recv(1)
    finally:
        os.kill(init, signal.SIGCONT)
        pair.mapped.channel.settimeout(60)
    assert json.loads(pair.mapped.channel.recv(1 << 20)) == [[0, 0]] * 16
    pair.anonymous.do("advise", 0, 8, DONTNEED)
    pair.compare()


def test_a_task_that_is_killed_while_it_waits_is_forgotten(pair: Pair) -> None:
    os.kill(pair.mapped.cell.init_pid, signal.SIGSTOP)
    try:
        waiting = pair.mapped.do("start", ["advise", 0, 64, DONTNEED])
        time.sleep(0.1)
        assert pair.mapped.do("kill", waiting) == signal.SIGKILL
    finally:
        os.kill(pair.mapped.cell.init_pid, signal.SIGCONT)
    pair.do("advise", 0, 8, DONTNEED)


def test_signals_do_not_show(pair: Pair) -> None:
    """With SA_RESTART; without it, a call that init has not yet received fails with EINTR."""
    for page, count in ((0, 64), (FREE_PLACE, 1)):
        pair.do("map", FREE_PLACE, 1)
        assert pair.do("interrupted", page, count, DONTNEED, 2000) == [[0, 0]]


page = st.integers(0, 140)


count = st.integers(1, 40)


operation = st.one_of(
    st.tuples(st.just("advise"), page, count, st.sampled_from([DONTNEED, DONTNEED, DONTNEED_LOCKED, 20, 22])),
    st.tuples(st.just("write"), page, st.sampled_from(["a", "b", "c"]), st.integers(1, 8)),
    st.tuples(st.just("protect"), page, count, st.sampled_from([0, 1, 3])),
    st.tuples(st.just("unmap"), page, st.integers(1, 8)),
    st.tuples(st.just("map"), page, st.integers(1, 8)),
    st.tuples(st.just("lock"), page, st.integers(1, 4)),
    st.tuples(st.just("unlock"), page, count),
    st.tuples(st.just("move"), page, st.integers(1, 16), st.integers(0, 200)),
    st.tuples(st.just("grow"), page, st.integers(1, 8), st.integers(1, 8), st.integers(0, 200)),
    st.tuples(st.just("child"), page, count),
)


@settings(max_examples=int(os.environ.get("REKINDLE_TEST_EXAMPLES", "50")), deadline=None, database=None)
@given(st.lists(operation, min_size=1, max_size=25))
def test_no_sequence_of_calls_tells_them_apart(both: Pair, operations: list[tuple[Any, ...]]) -> None:
    both.start()
    for name, *arguments in operations:
        match name:
            case "move":
                source, size, target = arguments
                both.do("remap", source, size, size, MAYMOVE | FIXED, target)
            case "grow":
                source, size, more, target = arguments
                both.grow(source, size, size + more, target)
            case "child":
                both.do("child", [["advise", *arguments, DONTNEED], ["look"]])
            case _:
                both.do(name, *arguments)


def test_the_filter_is_seen_in_a_process_by_its_first_bytes(both: Pair) -> None:
    """A dump takes it from there, and it is taken out of the dump again."""
    libc = ctypes.CDLL(None, use_errno=True)
    seize, interrupt, get_filter, detach = 0x4206, 0x4207, 0x420C, 17
    (pid,) = (pid for pid in processes.host_pids(both.mapped.cell) if pid != both.mapped.cell.init_pid)
    assert libc.ptrace(seize, pid, None, None) == 0
    try:
        assert libc.ptrace(interrupt, pid, None, None) == 0
        os.waitpid(pid, 0)
        program = ctypes.create_string_buffer(8 * 4096)
        count = libc.ptrace(get_filter, pid, None, program)
        assert count * 8 > len(FILTER)
        assert program.raw.startswith(FILTER)
    finally:
        libc.ptrace(detach, pid, None, None)
