# SPDX-License-Identifier: Apache-2.0
"""A file system whose daemon hears every request and answers none, as a dead network file system does.

A process that asks it for something and is killed stays in state D: the OS kernel waits for the answer.

Source: linux/fuse.h.
"""

import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from rekindle.cell import init

MNT_FORCE = 1
"""A flag of umount2 that ends a connection: whoever waits for an answer gets an error."""

_INIT = 26
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[None]:
    """Mounts one; at the end, its daemon is gone, and whoever waits for it gets an error."""
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    thread = threading.Thread(target=_listen, args=[fd])
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


def _listen(fd: int) -> None:
    with contextlib.suppress(OSError):  # ENODEV: the connection has ended
        while True:
            request = os.read(fd, 1 << 20)
            _, opcode, unique = struct.unpack_from("<IIQ", request)
            if opcode == _INIT:
                answer = _INIT_OUT.pack(7, 31, 0, 0, 0, 0, 4096, 1, 1, 0, 0)
                os.write(fd, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
