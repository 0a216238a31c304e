# SPDX-License-Identifier: Apache-2.0
"""Which processes are ours is told by descent, whatever they and others are called."""

import os
import subprocess
import time

from tests.traces import descendants


def test_descendants_are_ours_and_what_is_called_alike_is_not() -> None:
    script = "sleep 61 & bash -c 'exec -a \"grandchild ) 1 (\" sleep 62' & wait"
    with (
        subprocess.Popen(["bash", "-c", script], start_new_session=True) as parent,
        subprocess.Popen(["sleep", "61"]) as other,
    ):
        try:
            deadline = time.monotonic() + 10
            while set(descendants(of=parent.pid).values()) != {"sleep 61", "grandchild ) 1 ( 62"}:
                assert time.monotonic() < deadline
            below = descendants()
            assert {parent.pid, other.pid, *descendants(of=parent.pid)} <= below.keys()
            assert os.getpid() not in below
        finally:
            os.killpg(parent.pid, 9)
            other.kill()


def test_one_that_has_ended_is_none() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert process.pid not in descendants()
