# SPDX-License-Identifier: Apache-2.0
"""What a node is, as far as a restored process depends on it: processor and kernel."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The facts. `cpu_features` are the kernel's names of them, as in /proc/cpuinfo."""

    architecture: str
    cpu_model: str
    cpu_features: frozenset[str]
    kernel: str
    page_bytes: int

    @classmethod
    def probe(cls) -> Self:
        """Reads the facts of this node now."""
        facts: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        return cls(
            architecture=platform.machine(),
            cpu_model=facts.get("model name", "unknown"),
            cpu_features=frozenset((facts.get("flags") or facts.get("Features", "")).split()),
            kernel=platform.release(),
            page_bytes=os.sysconf("SC_PAGE_SIZE"),
        )


def boot_id() -> str:
    """Another one after every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
