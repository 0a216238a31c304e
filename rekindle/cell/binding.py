# SPDX-License-Identifier: Apache-2.0
"""Cover paths of a cell with others, so that its processes find those there.

The cell's init uses this module under `python -I -S`: it imports only the standard library, and little of it.
"""

import ctypes
import os

_MS_BIND, _MS_REC = 0x1000, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)


def bind(pairs: list) -> list[str]:  # type: ignore[type-arg]
    """Show the first path of each pair at the second, which exists. Return what could not be shown."""
    problems = []
    for source, target in pairs:
        flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
        if _libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None):
            problems.append(f"{target}: {os.strerror(ctypes.get_errno())}")
    return problems
