# SPDX-License-Identifier: Apache-2.0
"""How much memory there is for what is on GPUs, and whether a dump can hold it."""

import pytest

from rekindle.errors import DumpError
from snapshot.cuda_state import CudaState, require_state

GIB = 1 << 30


@pytest.mark.parametrize(
    ("held", "host", "dump", "lacks"),
    [
        ([], 0, 0, False),
        ([28 * GIB], 0, int(4.4 * GIB), True),  # as NvSnap met it
        ([28 * GIB], 4 * GIB, 27 * GIB, False),  # a fifth of it were contexts, kernels and workspaces
        ([28 * GIB], 4 * GIB, 26 * GIB, True),
        ([28 * GIB], 30 * GIB, 30 * GIB, True),  # all that is in it can be of the host's memory
        ([14 * GIB, 14 * GIB], 0, 23 * GIB, False),
        ([80 * GIB] * 8, 0, 512 * GIB, False),
        ([4 * GIB], 0, 2 * GIB, False),  # at least 2 GiB for each process
        ([4 * GIB], 0, 2 * GIB - 1, True),
        ([2 * GIB], 0, 0, False),
        ([0], GIB, 0, False),  # nobody tells what is on the GPU: it may be little
    ],
)
def test_a_dump_must_have_room_for_what_was_held(held: list[int], host: int, dump: int, lacks: bool) -> None:
    state = CudaState(held_bytes=dict(enumerate(held)), gpus=["GPU-0"], host_bytes=host)
    if lacks:
        with pytest.raises(DumpError, match="lacks the state of the GPU"):
            require_state(state, dump)
    else:
        require_state(state, dump)
