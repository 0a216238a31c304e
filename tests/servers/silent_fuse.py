# SPDX-License-Identifier: Apache-2.0
"""A file system whose daemon hears every request and answers none, as a dead network file system does.

A process that asks it for something and is killed stays in state D: the OS kernel waits for the answer.

With `holds_the_killed`, its one file can be opened and closed, and only a process that SIGKILL ends while it
has the file open stays, in its exit: as with a device whose driver does not let go of the killed.

Source: linux/fuse.h.
"""

import contextlib
import os
import signal
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from rekindle.cell import init

MNT_FORCE = 1
"""A flag of umount2 that ends a connection: whoever waits for an answer gets an error."""

_INIT = 26
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ROOT, _FILE = 1, 2  # nodes


@contextlib.contextmanager
def mounted(place: Path, *, holds_the_killed: bool = False) -> Iterator[None]:
    """Mounts one; at the end, its daemon is gone, and whoever waits for it gets an error."""
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    thread = threading.Thread(target=_listen, args=[fd, _answer if holds_the_killed else _answer_init])
    init.mount("silent", str(place), "fuse", 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other")
    thread.start()
    try:
        yield
    finally:
        init.libc.umount2(str(place).encode(), MNT_FORCE)
        thread.join(20)
        os.close(fd)
        init.libc.umount2(str(place).encode(), init.MNT_DETACH)
        place.rmdir()


def let_go(place: Path) -> None:
    """Lets everybody go who waits for an answer, with an error."""
    init.libc.umount2(str(place).encode(), MNT_FORCE)


def _listen(fd: int, answer_to: Callable[[int, int, int], bytes | None]) -> None:
    with contextlib.suppress(OSError):  # ENODEV: the connection has ended
        while True:
            request = os.read(fd, 1 << 20)
            _, opcode, unique, node, _, _, pid = struct.unpack_from("<IIQQIII", request)
            answer = answer_to(opcode, node, pid)
            if answer is not None:
                os.write(fd, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)


def _answer_init(opcode: int, node: int, pid: int) -> bytes | None:
    return _INIT_OUT.pack(7, 31, 0, 0, 0, 0, 4096, 1, 1, 0, 0) if opcode == _INIT else None


def _answer(opcode: int, node: int, pid: int) -> bytes | None:
    match opcode:
        case 1:  # LOOKUP: every name is that of the file
            return struct.pack("<QQQQII", _FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
        case 3:  # GETATTR
            return struct.pack("<QII", 0, 0, 0) + _attributes(node)
        case 14:  # OPEN
            return struct.pack("<QIi", 0, 0, 0)
        case 18:  # RELEASE
            return b""
        case 25:  # FLUSH, at each close
            return None if _is_killed(pid) else b""
    return _answer_init(opcode, node, pid)


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o644
    return struct.pack("<6Q10I", node, *[0] * 5, *[0] * 3, mode, 1, 0, 0, 0, 4096, 0)


def _is_killed(task: int) -> bool:
    """Whether a thread is in its exit because of SIGKILL: Linux, fs/proc/array.c (exit_code)."""
    exit_code = int(Path(f"/proc/{task}/stat").read_text().split()[-1])
    return exit_code & 0x7F == signal.SIGKILL
