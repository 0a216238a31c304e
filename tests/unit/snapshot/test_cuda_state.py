# SPDX-License-Identifier: Apache-2.0
"""How much memory there is for what is on GPUs, and whether a dump can hold it."""

import pytest

from rekindle.errors import DumpError
from snapshot.cuda_state import CudaState, require_state

GIB = 1 << 30


@pytest.mark.parametrize(
    ("pids", "gpus", "device", "host", "dump", "lacks"),
    [
        (0, 0, 0, 0, 0, False),
        (1, 1, 28 * GIB, 0, int(4.4 * GIB), True),  # as NvSnap met it
        (1, 1, 28 * GIB, 4 * GIB, 31 * GIB, False),
        (1, 1, 28 * GIB, 4 * GIB, 31 * GIB - 1, True),
        (1, 1, 28 * GIB, 30 * GIB, 30 * GIB, True),  # all that is in it can be of the host's memory
        (2, 1, 28 * GIB, 0, 26 * GIB, False),
        (8, 8, 640 * GIB, 0, 576 * GIB, False),
        (1, 0, 2 * GIB, 0, GIB, False),
        (1, 1, 0, GIB, 0, False),  # nobody tells what is on the GPU: it may be little
        (1, 1, 100 << 20, 100 << 20, 50 << 20, False),
    ],
)
def test_a_dump_must_have_room_for_what_was_held(
    pids: int, gpus: int, device: int, host: int, dump: int, lacks: bool
) -> None:
    state = CudaState(
        pids=range(pids), gpus=[str(n) for n in range(gpus)], device_bytes=device, host_bytes=host
    )
    if lacks:
        with pytest.raises(DumpError, match="lacks the state of the GPU"):
            require_state(state, dump)
    else:
        require_state(state, dump)
