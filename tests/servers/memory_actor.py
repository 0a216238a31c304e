# SPDX-License-Identifier: Apache-2.0
"""A process that calls the kernel about its memory as it is told, and reports what its memory is then.

It is told over descriptor 3, a line of JSON at a time, and answers in kind. Each request is an operation and
its arguments; the answer is what the call returned, a place where one was asked for being told as a page of
the arena, and its errno. Calls are about the pages of an arena that begins at START.

    ["set", path, areas]         the arena anew: areas of [page, count, page in the file] are mapped from it
                                 (MAP_PRIVATE), as a restored process has them...
    ["fill", path, areas]        ... or are anonymous memory into which the file's data is read
    ["look"]                     the pages that are mapped: [page, permissions, checksum]
    ["child", operations]        a forked child does these, and what it said is the answer
    ["threads", n, operations]   n threads do them at once, each its own (operations[i % len])
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import zlib
from typing import Any

START = 0x2000_0000_0000
PAGES = 512
PAGE = mmap.PAGESIZE
END = START + PAGES * PAGE
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_SHARED = 0x02, 0x10, 0x20, 0x01
FAILED = (1 << 64) - 1

libc = ctypes.CDLL(None, use_errno=True)
address, size = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [address, size, size, ctypes.c_int, address]
libc.munmap.argtypes = libc.mlock.argtypes = libc.munlock.argtypes = [address, size]
libc.madvise.argtypes = libc.mprotect.argtypes = [address, size, ctypes.c_int]

memory = os.open("/proc/self/mem", os.O_RDWR)


def result(returned: int | None) -> list[int]:
    """Tell what a call returned: addresses as pages, failures with their errno."""
    if returned in (-1, FAILED):
        return [-1, ctypes.get_errno()]
    if returned is not None and returned >= START:
        return [(returned - START) // PAGE, 0]
    return [returned or 0, 0]


def place(page: float) -> int:
    return START + int(page * PAGE)


class Actor:
    def set(self, path: str, areas: list[list[int]]) -> None:
        libc.munmap(START, END - START)
        with open(path, "rb") as file:
            for page, count, source in areas:
                flags = MAP_PRIVATE | MAP_FIXED
                libc.mmap(place(page), count * PAGE, 3, flags, file.fileno(), source * PAGE)

    def fill(self, path: str, areas: list[list[int]]) -> None:
        libc.munmap(START, END - START)
        with open(path, "rb") as file:
            for page, count, source in areas:
                self.map(page, count)
                for number in range(count):
                    content = os.pread(file.fileno(), PAGE, (source + number) * PAGE)
                    if any(content):
                        os.pwrite(memory, content, place(page + number))

    def look(self) -> list[list[Any]]:
        found = []
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, permissions, *_ = line.split()
                start, end = (int(text, 16) for text in span.split("-"))
                for at in range(max(start, START), min(end, END), PAGE):
                    try:
                        checksum = zlib.crc32(os.pread(memory, PAGE, at))
                    except OSError as error:  # past the end of the file, where a touch would be SIGBUS
                        checksum = -(error.errno or 1)
                    found.append([(at - START) // PAGE, permissions, checksum])
        return found

    def own(self, page: int, count: int) -> int:
        """Count the pages that are this process's own: present, and not those of a file."""
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), 8 * count, place(page) // PAGE * 8)
        return sum(byte & 0x80 and not byte & 0x20 for byte in entries[7::8])

    def advise_with_vvar(self, vvar: float, page: float, count: float, advice: int) -> list[int]:
        """Advise while the kernel's data for the clock, which is no memory, is in the arena.

        Without it, reading the clock would kill the process.
        """
        with open("/proc/self/maps") as maps:
            (span,) = (line.split()[0] for line in maps if line.rstrip().endswith("[vvar]"))
        start, end = (int(text, 16) for text in span.split("-"))
        libc.mremap(start, end - start, end - start, 3, place(vvar))
        answer = self.advise(page, count, advice)
        libc.mremap(place(vvar), end - start, end - start, 3, start)
        return answer

    def write(self, page: float, content: str, count: int = 1) -> list[int]:
        """Write, whatever the protection, the same bytes into every page."""
        written = 0
        for number in range(count):
            try:
                written += os.pwrite(memory, content.encode(), place(page + number))
            except OSError:
                return [-1, written]
        return [written, 0]

    def store(self, page: float, content: str) -> None:
        ctypes.memmove(place(page), content.encode(), len(content))

    def read(self, page: float, count: int) -> str:
        return ctypes.string_at(place(page), count).hex()

    def call(self, page: float) -> int:
        """Run what is there as code."""
        return int(ctypes.CFUNCTYPE(ctypes.c_int)(place(page))())

    def map(self, page: float, count: int, protection: int = 3) -> list[int]:
        flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS
        return result(libc.mmap(place(page), count * PAGE, protection, flags, -1, 0))

    def share(self, page: float, count: int) -> list[int]:
        flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS
        return result(libc.mmap(place(page), count * PAGE, 3, flags, -1, 0))

    def map_file(self, path: str, page: float, count: int) -> list[int]:
        with open(path, "rb") as file:
            flags = MAP_PRIVATE | MAP_FIXED
            return result(libc.mmap(place(page), count * PAGE, 3, flags, file.fileno(), 0))

    def unmap(self, page: float, count: float) -> list[int]:
        return result(libc.munmap(place(page), int(count * PAGE)))

    def protect(self, page: float, count: float, protection: int) -> list[int]:
        return result(libc.mprotect(place(page), int(count * PAGE), protection))

    def lock(self, page: float, count: float) -> list[int]:
        return result(libc.mlock(place(page), int(count * PAGE)))

    def unlock(self, page: float, count: float) -> list[int]:
        return result(libc.munlock(place(page), int(count * PAGE)))

    def advise(self, page: float, count: float, advice: int) -> list[int]:
        return result(libc.madvise(place(page), int(count * PAGE), advice))

    def advise_other(self, page: float, count: float, advice: int) -> list[int]:
        """Call process_madvise on this process itself."""
        fd = os.pidfd_open(os.getpid())
        vector = (ctypes.c_uint64 * 2)(place(page), int(count * PAGE))
        done = result(libc.syscall(440, fd, vector, size(1), advice, 0))
        os.close(fd)
        return done

    def remap(self, page: float, old: float, new: float, flags: int, target: float = 0) -> list[int]:
        returned = libc.mremap(place(page), int(old * PAGE), int(new * PAGE), flags, place(target))
        return result(returned)

    def copy(self, page: int, old: int, new: int, target: int) -> list[int]:
        """Do what realloc does where mremap fails: allocate, copy and free. Permissions are kept."""
        with open("/proc/self/maps") as maps:
            spans = [line.split()[:2] for line in maps]
        (permissions,) = (
            permissions
            for span, permissions in spans
            if int(span.split("-")[0], 16) <= place(page) < int(span.split("-")[1], 16)
        )
        content = os.pread(memory, old * PAGE, place(page))
        made = self.map(target, new)
        os.pwrite(memory, content, place(target))
        self.protect(
            target, new, sum(bit for bit, name in ((1, "r"), (2, "w"), (4, "x")) if name in permissions)
        )
        self.unmap(page, old)
        return made

    def child(self, operations: list[list[Any]]) -> list[Any]:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = json.dumps([self.do(operation) for operation in operations])
            with open(writer, "w") as file:
                file.write(said)
            os._exit(0)
        os.close(writer)
        with open(reader) as file:
            said = file.read()
        status = os.waitpid(pid, 0)[1]
        return [status, json.loads(said) if said else None]

    def become(self, uid: int) -> list[int]:
        """Give up all privileges, so that only the privileged may look at this process."""
        os.setresuid(uid, uid, uid)
        return result(libc.prctl(4, 0))  # PR_SET_DUMPABLE

    def run(self, program: str) -> str:
        """Run another Python program in this one's place in a child, and return what it prints."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writer, 1)
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", program])
        os.close(writer)
        with open(reader) as file:
            said = file.read()
        os.waitpid(pid, 0)
        return said

    def start(self, operation: list[Any]) -> int:
        """Do an operation in a child and return its PID."""
        pid = os.fork()
        if pid == 0:
            self.do(operation)
            os._exit(0)
        return pid

    def kill(self, pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    def interrupted(self, page: float, count: float, advice: int, times: int) -> list[list[int]]:
        """Advise again and again while signals come, and return the different answers."""
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        answers = {tuple(self.advise(page, count, advice)) for _ in range(times)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        return sorted(map(list, answers))

    def threads(self, count: int, operations: list[list[Any]]) -> list[Any]:
        said: list[Any] = [None] * count
        barrier = threading.Barrier(count)

        def run(number: int) -> None:
            barrier.wait()
            said[number] = self.do(operations[number % len(operations)])

        running = [threading.Thread(target=run, args=[number]) for number in range(count)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return said

    def do(self, operation: list[Any]) -> Any:
        return getattr(self, operation[0])(*operation[1:])


def main() -> None:
    actor = Actor()
    with socket.socket(fileno=int(sys.argv[1])) as channel, channel.makefile("rw") as lines:
        for line in lines:
            lines.write(json.dumps(actor.do(json.loads(line))) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
