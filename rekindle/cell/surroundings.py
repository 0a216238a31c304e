# SPDX-License-Identifier: Apache-2.0
"""Clocks and network of a new cell. Imported by its launcher, so it uses only the standard library."""

import fcntl
import socket
import struct
import time


def set_clock(name: str, target_ns: int) -> None:
    """Set a clock to `target_ns` in the time namespace that our children will enter.

    /proc/self/timens_offsets counts from the initial namespace, so the offset of our own namespace is
    added.
    """
    clock = {"monotonic": 1, "boottime": 7}[name]
    with open("/proc/self/timens_offsets") as file:
        present = {fields[0]: int(fields[1]) * 10**9 + int(fields[2]) for fields in map(str.split, file)}
    seconds, nanoseconds = divmod(present[name] + target_ns - read_clock(clock), 10**9)
    with open("/proc/self/timens_offsets", "w") as file:
        file.write(f"{name} {seconds} {nanoseconds}\n")


def read_clock(clock: int) -> int:
    return time.clock_gettime_ns(clock)


def raise_loopback() -> None:
    siocgifflags, siocsifflags, iff_up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(sock, siocgifflags, request))[1]
        fcntl.ioctl(sock, siocsifflags, struct.pack("16sH14x", b"lo", flags | iff_up))
