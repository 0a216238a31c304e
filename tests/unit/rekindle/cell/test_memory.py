# SPDX-License-Identifier: Apache-2.0
"""Which calls the filter for memory files stops: its program is run as the kernel runs it."""

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rekindle.cell import memory

ALLOW, NOTIFY, EINVAL, ENOSYS = 0x7FFF0000, 0x7FC00000, 0x00050016, 0x00050026
DROPPING = {4, 8, 24, 102}
MACHINES = sorted(memory._MACHINES)


def run(program: bytes, data: bytes) -> int:
    """Run a classic BPF program as linux/filter.h defines it."""
    instructions = list(struct.iter_unpack("HBBI", program))
    at = accumulator = index = 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("I", data, operand)
            case 0x07:
                index = accumulator
            case 0x54:
                accumulator &= operand
            case 0x06:
                return int(operand)
            case _:
                other = index if code & 0x08 else operand
                holds = {
                    0x10: accumulator == other,
                    0x20: accumulator > other,
                    0x30: accumulator >= other,
                    0x40: bool(accumulator & other),
                }[code & 0xF0]
                assert code & 0x07 == 0x05
                at += if_true if holds else if_false


PROGRAMS = {name: memory._filter(machine) for name, machine in memory._MACHINES.items()}


def call(
    machine: str, architecture: int, number: int, arguments: list[int], ranges: list[tuple[int, int]]
) -> int:
    program = PROGRAMS[machine] + memory._places(ranges)
    return run(program, struct.pack("=IIQ6Q", number, architecture, 0, *arguments))


word = st.integers(0, (1 << 64) - 1)
small = st.integers(0, 5) | st.integers((1 << 32) - 2, (1 << 32) + 2) | word
address = st.integers(0, 1 << 47) | st.integers(0x7FFF_0000_0000, 0x7FFF_FFFF_F000)
ranges = st.lists(st.tuples(address, st.integers(1, 1 << 36)), max_size=60).map(
    lambda spans: [(start, start + size) for start, size in sorted(spans)]
)
advice = st.sampled_from([*range(30), 102, 103, 1 << 32, (1 << 32) + 4]) | word


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("mode", ["native", "compat"])
@given(advice=advice, rest=st.lists(word, min_size=5, max_size=5))
def test_advice_that_drops_pages_is_stopped(machine: str, mode: str, advice: int, rest: list[int]) -> None:
    architecture, madvise, _ = getattr(memory._MACHINES[machine], mode)
    drops = advice & 0xFFFFFFFF in DROPPING  # an int
    a, b, c, d, e = rest
    assert call(machine, architecture, madvise, [a, b, advice, c, d, e], []) == (NOTIFY if drops else ALLOW)
    assert call(machine, architecture, 440, [a, b, c, advice, d, e], []) == (EINVAL if drops else ALLOW)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("mode", ["native", "compat"])
@given(old=small, new=small, flags=st.integers(0, 15) | word)
@example(old=1 << 32, new=5, flags=1)
@example(old=5, new=1 << 32, flags=1)
@example(old=(1 << 32) + 5, new=(1 << 32) + 5, flags=1)
def test_growth_is_stopped_wherever_it_is(machine: str, mode: str, old: int, new: int, flags: int) -> None:
    architecture, _, mremap = getattr(memory._MACHINES[machine], mode)
    is_large_move = flags & 2 and old >= 1 << 32
    stops = new > old or flags & 4 or is_large_move
    answer = call(machine, architecture, mremap, [0, old, new, flags, 0, 0], [])
    assert answer == (NOTIFY if stops else ALLOW)


@pytest.mark.parametrize("machine", MACHINES)
@given(ranges=ranges, start=address, size=small, within=st.integers(0, 1 << 40), pick=st.integers(0, 59))
def test_moves_from_where_memory_files_are_are_stopped(
    machine: str, ranges: list[tuple[int, int]], start: int, size: int, within: int, pick: int
) -> None:
    architecture, _, mremap = memory._MACHINES[machine].native
    if ranges and pick % 2:  # begin shortly before one, or in it
        low, high = ranges[pick % len(ranges)]
        start = max(low - size + 1 + within % (high - low + size), 0)
    answer = call(machine, architecture, mremap, [start, size, size, 3, 0x1000, 0], ranges)
    if any(low < start + size and start < high for low, high in ranges):
        assert answer == NOTIFY
    near = 2 << 32
    is_far = all(high + near < start or start + size < low - near for low, high in ranges)
    if is_far and size < 1 << 32 and len(ranges) <= 32:
        assert answer == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("mode", ["native", "compat"])
@settings(max_examples=5)
@given(arguments=st.lists(advice, min_size=6, max_size=6))
def test_no_other_call_is_stopped(machine: str, mode: str, arguments: list[int]) -> None:
    architecture, *stopped = getattr(memory._MACHINES[machine], mode)
    for number in set(range(600)) - {*stopped, 440}:
        assert call(machine, architecture, number, arguments, []) == ALLOW
    assert call(machine, 0x1234, stopped[0], arguments, []) == ALLOW


@pytest.mark.parametrize("number", [0x40000000 | 28, 0x40000000 | 25, 0x40000000 | 440, 0xFFFFFFFF])
def test_calls_of_x32_do_not_exist(number: int) -> None:
    assert call("x86_64", 0xC000003E, number, [0, 1, 4, 4, 0, 0], []) == ENOSYS
