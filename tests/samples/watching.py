# SPDX-License-Identifier: Apache-2.0
"""What tests of a cache's watch look at, and processes that use the cache meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

from rekindle.engine.caches import CacheKind
from restore.rungs.observe import Observed, ObservedRoot

TRITON = CacheKind.TRITON


def only(seen: Observed) -> ObservedRoot:
    (root,) = seen.roots
    return root


def keys(seen: Observed) -> tuple[set[str], set[str]]:
    return set(only(seen).used), set(only(seen).made)


def python(program: str, *words: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE)


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


def triton_puts(entry: Path, name: str, content: bytes = b"kernel") -> None:
    """As Triton's FileCacheManager does it."""
    temporary = entry / f"tmp.pid_{os.getpid()}_{name}"
    temporary.mkdir(parents=True)
    (temporary / name).write_bytes(content)
    os.replace(temporary / name, entry / name)
    os.removedirs(temporary)
