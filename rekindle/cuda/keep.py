# SPDX-License-Identifier: Apache-2.0
"""Keep GPUs initialized while no server holds them.

Without persistence mode, the OS kernel's driver shuts a GPU down when the last process closes its device. A
checkpoint does just that, and then fails and kills its process (NVIDIA/cuda-checkpoint#25).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def kept_initialized(dev: Path = Path("/dev")) -> Iterator[None]:
    """Hold the devices of this node's NVIDIA GPUs within the context. The first to hold one waits seconds."""
    with contextlib.ExitStack() as stack:
        for path in sorted(dev.glob("nvidia[0-9]*")):
            with contextlib.suppress(OSError):  # not ours, or not there
                stack.callback(os.close, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        yield
