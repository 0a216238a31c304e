# SPDX-License-Identifier: Apache-2.0
"""Time madvise and mremap in a cell, of anonymous and of mapped memory; see hack/bench-memory-calls.

The same program runs twice: without a filter, all its memory anonymous, and with a memory file of which half
is a hole.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from rekindle.cell import MEMORY_PLACE, Cell, Command, MemoryFiles, Network

START = 0x2000_0000_0000
BYTES = 256 << 20

PROGRAM = """
import ctypes, json, os, signal, statistics, sys, threading, time
start, size, calls, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
libc = ctypes.CDLL(None, use_errno=True)
address, length = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype = libc.mremap.restype = address
libc.mmap.argtypes = [address, length, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [address, length, ctypes.c_int]
libc.mremap.argtypes = [address, length, length, ctypes.c_int, address]
elsewhere = libc.mmap(None, 1 << 20, 3, 0x22, -1, 0)
if path:
    libc.mmap(start, size, 3, 0x12, os.open(path, os.O_RDONLY), 0)
else:
    libc.mmap(start, size, 3, 0x32, -1, 0)
PAGE, MIB, DONTNEED, FREE = 4096, 1 << 20, 4, 8

def measure(times, call, prepare=lambda: None):
    taken = []
    for _ in range(times):
        prepare()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    taken.sort()
    return [statistics.median(taken) * 1e6, taken[len(taken) * 99 // 100] * 1e6, times]

def drop(where, bytes):
    if libc.madvise(where, bytes, DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")

def touch(where, bytes):
    return lambda: ctypes.memset(where, 1, bytes)

def at_once(count, where, step):
    ended = time.perf_counter() + 2
    made = [0] * count
    def run(number):
        while time.perf_counter() < ended:
            drop(where + number * step, PAGE)
            made[number] += 1
    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [sum(made) / 2, 0, sum(made)]

hole = start + size // 2
print(json.dumps({
    "a call that is not stopped (MADV_WILLNEED)": measure(calls, lambda: libc.madvise(elsewhere, PAGE, 3)),
    "4 KiB elsewhere": measure(calls, lambda: drop(elsewhere, PAGE)),
    "4 KiB, in a hole of the file": measure(calls, lambda: drop(hole, PAGE), touch(hole, PAGE)),
    "4 KiB": measure(calls, lambda: drop(start, PAGE), touch(start, PAGE)),
    "2 MiB": measure(calls // 10, lambda: drop(start, 2 * MIB), touch(start, 2 * MIB)),
    "64 MiB": measure(max(calls // 100, 5), lambda: drop(start, 64 * MIB), touch(start, 64 * MIB)),
    "64 MiB, in a hole of the file": measure(
        max(calls // 100, 5), lambda: drop(hole, 64 * MIB), touch(hole, 64 * MIB)
    ),
    "MADV_FREE of 4 KiB": measure(calls, lambda: libc.madvise(start, PAGE, FREE), touch(start, PAGE)),
    "mremap that grows": measure(calls, lambda: libc.mremap(start, size // 4, size // 2, 0, 0)),
    "calls/s of 8 threads, elsewhere": at_once(8, elsewhere, PAGE),
    "calls/s of 8 threads, 4 KiB each": at_once(8, start, PAGE),
}))
"""


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "files"
        directory.mkdir()
        with open(directory / "1", "wb") as file:
            for _ in range(BYTES // 2 >> 20):
                file.write(os.urandom(1 << 20))
            file.truncate(BYTES)
        memory = MemoryFiles(directory=directory, ranges=[(START, START + BYTES)])
        plain = measured(Path(name), calls, None)
        mapped = measured(Path(name), calls, memory)
    print(f"median in us (99th percentile), n; {os.cpu_count()} cores, Linux {os.uname().release}")
    print("| `MADV_DONTNEED` unless it says otherwise | anonymous, no filter | mapped, with the filter | n |")
    print("|---|--:|--:|--:|")
    for what, (median, most, count) in plain.items():
        ours, ours_most, ours_count = mapped[what]
        if what.startswith("calls/s"):
            print(f"| {what} | {median:,.0f} | {ours:,.0f} | {ours_count:,.0f} |")
        else:
            print(f"| {what} | {median:,.1f} ({most:,.1f}) | {ours:,.1f} ({ours_most:,.1f}) | {count:,.0f} |")


def measured(place: Path, calls: int, memory: MemoryFiles | None) -> dict[str, list[float]]:
    output = place / "output"
    output.write_bytes(b"")
    path = str(MEMORY_PLACE / "1") if memory else ""
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        status = cell.run(
            Command(
                argv=[sys.executable, "-I", "-S", "-c", PROGRAM, str(START), str(BYTES), str(calls), path],
                env={},
                cwd=Path("/"),
                files={0: Path(os.devnull), 1: output, 2: output},
                memory=memory,
            ),
            timeout=300,
        )
    if status != 0:
        sys.exit(output.read_text())
    found: dict[str, list[float]] = json.loads(output.read_text())
    return found


if __name__ == "__main__":
    main()
