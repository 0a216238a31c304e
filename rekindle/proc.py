# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of this process and this boot."""

import os
import time
from pathlib import Path


def boot_id() -> str:
    """Another one after every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def peak_rss_bytes() -> int:
    """The most memory that this process has had. Not by getrusage, which begins with that of the parent if it
    started us by vfork."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def process_age() -> float:
    """Seconds since this process was started, by the kernel's account (its unit is 10 ms)."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    started = ticks / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
