# SPDX-License-Identifier: Apache-2.0
"""A signal ends a command at whatever moment it comes."""

import signal
import subprocess
import sys

import pytest

# As in a command that works on, a minute long, after Python has dropped the exception.
LOST = """
import os, sys, time, types
import rekindle.__main__ as main

class Collected:
    def __del__(self):
        os.kill(os.getpid(), {signum})

def verb(words):
    Collected()
    time.sleep(60)

sys.modules["cli.match"] = types.SimpleNamespace(main=verb)
sys.argv = ["rekindle", "match"]
main.run()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_in_a_callback_is_not_lost(signum: int) -> None:
    program = [sys.executable, "-c", LOST.format(signum=int(signum))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 128 + signum
    assert done.stderr == ""


def test_an_ignored_signal_stays_ignored_after_another_that_was_lost() -> None:
    script = 'trap "" HUP; exec "$@"'
    program = LOST.format(signum=int(signal.SIGTERM)).replace(
        "time.sleep(60)", "os.kill(os.getpid(), 1); time.sleep(60)"
    )
    command = ["sh", "-c", script, "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 128 + signal.SIGTERM
